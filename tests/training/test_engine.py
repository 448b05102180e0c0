"""What happens before an engine stands."""

from training.engine import say_what_is_compiled


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
