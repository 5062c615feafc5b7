"""Every test, and every process that it starts, runs on one thread and starts from one seed."""

import os
import signal
import sys
import textwrap

import absl.logging
import pytest
import torch

from tests.runs import fork

# Hydra shuts all log handlers down, and absl's (tensorboard and openvino bring it) then closes the
# stream that was sys.stderr when it was imported: here, the one that pytest captures with.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # sums in another order would not be equal bit for bit


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # a benchmark that ran in this process may have set more


@pytest.fixture(autouse=True)
def _signals():
    """Commands that run inside a test listen to signals; afterwards pytest does again."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _execute(code, arguments, log):
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


@pytest.fixture
def two_ranks(tmp_path):
    """Run a script in two processes of one gloo group, and load what each saved under ``out``."""

    def run(script):
        head = f"""
            import sys, torch, torch.distributed as dist
            rank, out = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group(
                "gloo", init_method="file://{tmp_path}/group", rank=rank, world_size=2
            )
        """
        # both leave together, and at once: threads of gloo may abort an interpreter that winds down
        tail = "\ndist.barrier()\ndist.destroy_process_group()\nimport os\nos._exit(0)\n"
        code = textwrap.dedent(head) + textwrap.dedent(script) + tail
        outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
        logs = [tmp_path / f"{rank}.log" for rank in range(2)]
        ranks = [fork(_execute, code, [str(r), str(outs[r])], logs[r]) for r in range(2)]
        try:
            for process in ranks:
                process.join(120)
        finally:
            for process in ranks:
                process.kill()
        messages = "\n".join(log.read_text() for log in logs)
        assert [process.exitcode for process in ranks] == [0, 0], messages
        return [torch.load(out, weights_only=True) for out in outs]

    return run
