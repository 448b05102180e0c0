"""What happens before an engine stands."""

from types import SimpleNamespace

import torch

from training.engine import (
    device_with_room,
    limit_gpu_memory,
    say_what_is_compiled,
)


def test_a_lock_on_an_op_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "cpu_adam").mkdir()
    say_what_is_compiled()
    assert capsys.readouterr().out == ""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    say_what_is_compiled()
    assert (
        capsys.readouterr().out
        == f"cpu_adam is being compiled by another process; if there is none, delete {lock}\n"
    )
    monkeypatch.setenv("RANK", "1")
    say_what_is_compiled()
    assert capsys.readouterr().out == ""


def test_memory_that_a_run_may_use(monkeypatch):
    """With a GPU of 80 bytes that is only described, of which another process has 30."""
    gpu, caps = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share))
    for limit in (20.0, 160.0):
        limit_gpu_memory(limit, gpu)
    limit_gpu_memory(20.0, torch.device("cpu"))
    assert caps == [0.25, 1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    for share, room in ((1.0, 50), (0.25, 10)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, share=share: share)
        assert device_with_room(gpu, 0.8 * room - 0.1) == gpu
        assert device_with_room(gpu, 0.8 * room) == torch.device("cpu")
    assert device_with_room(torch.device("cpu"), 0) == torch.device("cpu")
