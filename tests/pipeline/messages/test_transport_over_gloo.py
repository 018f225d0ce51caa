"""Two processes, nothing simulated: what gloo does with a message of another size than the receiver's buffer."""

from __future__ import annotations

import signal as signals
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class TestGloo:
    """What gloo does with a message of another size than the receiver's buffer: with two processes, nothing simulated."""

    BOTH = """
        import sys
        from datetime import timedelta
        import torch, torch.distributed as dist
        from lightning_sentinel.errors import MalformedMessageError
        from lightning_sentinel.pipeline.messages.headers import Expected, Kind, Place, encode
        from lightning_sentinel.pipeline.processes.liveness import is_lost_connection
        from lightning_sentinel.pipeline.messages.transport import Transport

        rank, file = int(sys.argv[1]), sys.argv[2]
        store = dist.FileStore(file, 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        due, signal, no = Place(0, 0, Kind.GRADIENT), torch.ones(8), torch.tensor(False)
    """
    SENDER = """
        dist.send(encode(due, (8,), torch.float32), 1)
        dist.send(torch.zeros(5), 1)
        dist.send(encode(due, (8,), torch.float32)[:9], 1)
        Transport(torch.device("cpu")).send(signal, no, 1, due)
        dist.send(encode(due, (8,), torch.float32), 1)
        try:
            dist.send(torch.zeros(500_000), 1)
            Transport(torch.device("cpu")).receive(1, due, Expected.like(signal))
        except RuntimeError as error:
            print("lost:", is_lost_connection(error))
    """
    RECEIVER = """
        def receive():
            return Transport(torch.device("cpu")).receive(0, due, Expected.like(signal))

        for _ in range(2):
            try:
                receive()
            except MalformedMessageError as error:
                print(error, flush=True)
        print("received", receive()[0].tolist(), flush=True)
        print("received", receive(), flush=True)
    """

    def test_sizes_that_do_not_fit(self, tmp_path: Path) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(self.BOTH) + textwrap.dedent(code), str(rank), str(tmp_path / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for rank, code in enumerate((self.SENDER, self.RECEIVER))
        ]
        try:
            (sent, sender_errors), (received, errors) = (process.communicate(timeout=50) for process in processes)
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, -signals.SIGABRT], (sender_errors, errors)
        lines = received.splitlines()
        # A shorter message is noticed by us alone, and does no harm to the one after it.
        assert "has fewer elements than the 9 of shape (8,)" in lines[0]
        assert "must not be negative" in lines[1]
        assert lines[2:] == [f"received {[1.0] * 8}"]
        # A longer one ends the process of the receiver, whose peer sees it as lost.
        assert "Received data size doesn't match expected size" in errors
        assert sent.splitlines() == ["lost: True"]
