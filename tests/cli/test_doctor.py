"""`quire doctor`: on this machine as it is, with settings that cannot work, and on GPUs as nvidia-smi describes them."""

import socket
from pathlib import Path

import pytest
from quire_command import quire

from quire.cli.doctor_checks import shared_memory
from quire.cli.doctor_finding import Finding, Verdict
from quire.cli.doctor_gpu_checks import judge, links
from quire.cli.nvidia import parse_gpus, parse_matrix

FREE = ("--listen", "127.0.0.1:0", "--device", "cpu")

TWO_GPUS = "0, NVIDIA H100 80GB HBM3, 550.90.07, 81559, 81008, 9.0, 0\n1, NVIDIA H100 80GB HBM3, 550.90.07, 81559, 20000, 9.0, 3\n"
OLD_GPU = "0, Tesla T4, 535.104.05, 15360, 15000, 7.5, [N/A]\n"
# As `nvidia-smi topo` prints them, with the underlined headings of a terminal.
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\n"
    "GPU1\tNV18\t X \tSYS\tSYS\t0-31\t0\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
)
PEER_READS = " \tGPU0\tGPU1\n GPU0\tX\tOK\n GPU1\tOK\tX\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"


def test_a_machine_that_can_serve_is_told_so_line_by_line() -> None:
    done = quire("doctor", *FREE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`quire serve` can work here" in done.stdout
    for word in ("Python 3", "packages", "Ray", "shared memory", "clock", "free for clients", "tokenizer", "host memory: 1 x ("):
        assert word in done.stdout, done.stdout
    assert "BAD" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("/nonexistent", *FREE), "/nonexistent is not a folder"),
        ((*FREE, "--kv-cache-memory", "900Ti"), "GiB available"),
        (("--device", "cpu", "--listen", "0.0.0.0:0"), "reachable from other hosts"),
        ((*FREE, "--tensor-parallel-size", "7"), "cannot be split over 7 ranks"),
        (("--listen", "127.0.0.1:0", "--device", "cuda"), "no NVIDIA driver"),
    ],
)
def test_what_cannot_work_is_bad_and_says_what_to_do(arguments: tuple[str, ...], says: str) -> None:
    done = quire("doctor", *arguments)
    if says == "no NVIDIA driver" and Path("/dev/nvidiactl").exists():
        assert "GPU 0: " in done.stdout  # the same settings, on a machine that has one
        return
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("BAD") and says in line]
    assert lines[at + 1].strip().startswith("-> ")


def test_a_taken_port_is_bad_when_it_was_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = quire("doctor", *FREE, "--metrics-listen", address)
    assert done.returncode == 1
    assert f"BAD   {address}, for metrics of the gateway: the port is taken" in done.stdout


def test_too_little_shared_memory_is_bad(tmp_path: Path) -> None:
    (finding,) = shared_memory(tmp_path / "missing")
    assert finding.verdict is Verdict.BAD
    (finding,) = shared_memory(Path("/proc"))  # a file system without any room
    assert finding.verdict is Verdict.BAD
    assert "--shm-size" in finding.advice


def test_gpus_are_judged_by_age_errors_free_memory_and_number() -> None:
    first, second, missing = judge(parse_gpus(TWO_GPUS), num_wanted=3)
    assert first.verdict is Verdict.GOOD
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, driver 550.90.07, 79.1 of 79.6 GiB free" in first.what
    assert second.verdict is Verdict.NOTE
    assert "3 uncorrected memory errors" in second.what
    assert missing == Finding(Verdict.BAD, "3 ranks want a GPU each, and there are 2", "lower --groups or --tensor-parallel-size")
    (old,) = judge(parse_gpus(OLD_GPU), num_wanted=1)
    assert old.verdict is Verdict.BAD
    (idle,) = judge(parse_gpus(OLD_GPU), num_wanted=0)
    assert idle.verdict is Verdict.NOTE


def test_links_are_read_from_the_topology() -> None:
    assert parse_matrix(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    assert parse_matrix(PEER_READS) == {(0, 1): "OK"}
    assert parse_matrix("no GPUs here\n") == {}


def test_slow_links_are_noted_and_fast_ones_praised() -> None:
    slow, reads = links(lambda: parse_matrix(TOPOLOGY), lambda: parse_matrix(PEER_READS), is_split=True)
    assert (slow.verdict, slow.what) == (Verdict.NOTE, "not linked by NVLink: 0-2 SYS, 1-2 SYS")
    assert slow.advice
    assert reads.verdict is Verdict.GOOD
    fast, blind = links(lambda: {(0, 1): "NV12"}, lambda: {(0, 1): "CNS"}, is_split=False)
    assert (fast.verdict, fast.what) == (Verdict.GOOD, "all 1 pairs of GPUs are linked by NVLink (NV12)")
    assert (blind.verdict, blind.what) == (Verdict.NOTE, "cannot read each other's memory: 0-1 CNS")


def test_a_topology_that_cannot_be_had_is_only_noted() -> None:
    def fail() -> dict[tuple[int, int], str]:
        raise OSError("nvidia-smi ended with 1")

    (finding,) = links(fail, fail, is_split=True)
    assert finding.verdict is Verdict.NOTE
