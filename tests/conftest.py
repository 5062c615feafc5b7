"""Every test, and every process that it starts, runs on one thread and starts from one seed."""

import os
import signal
import subprocess
import sys
import textwrap

import absl.logging
import pytest
import torch

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


@pytest.fixture
def two_ranks(tmp_path, pytestconfig):
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
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(out)],
                cwd=pytestconfig.rootpath,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, out in enumerate(outs)
        ]
        try:
            messages = [process.communicate(timeout=120)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(messages)
        return [torch.load(out, weights_only=True) for out in outs]

    return run
