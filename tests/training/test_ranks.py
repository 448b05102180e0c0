"""What a process learns from whatever started it."""

import pytest

from training.ranks import first_host, interface_towards, rank_variables, tasks_per_node

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_rank_of_slurm():
    expected = {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "23072",
    }
    assert rank_variables(SLURM) == expected
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}
    assert rank_variables(SLURM | chosen) == expected | chosen
    last = SLURM | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert rank_variables(last)["LOCAL_WORLD_SIZE"] == "1"


def test_a_rank_of_open_mpi():
    said = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    variables = rank_variables({f"OMPI_COMM_WORLD_{name}": value for name, value in said.items()})
    assert variables == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "RANK": "0"},  # torchrun or DeepSpeed, started by srun
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_that_is_alone_or_knows_already(environment):
    assert rank_variables(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3,5-7]", "node3"),
        ("a-[08-10]-ib,b", "a-08-ib"),
        ("rack[1-2]n[4-5]", "rack1n4"),
    ],
)
def test_first_machine_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_every_machine():
    assert tasks_per_node("8(x3)") == [8, 8, 8]
    assert tasks_per_node("2,1(x2)") == [2, 1, 1]


def test_loopback_is_no_way_to_other_machines():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("::1") is None
