"""Two processes, nothing simulated: what gloo does with a message of another size than the receiver's buffer."""

from __future__ import annotations

import signal as signals
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.messages.headers import Expected, Kind, MessageId, encode
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.processes.lost_connections import is_lost_connection
from lightning_sentinel.pipeline.processes.torch_wire import TorchWire
from lightning_sentinel.pipeline.processes.wire import install
from tests.distributed import starting

DUE = MessageId(0, 0, Kind.GRADIENT)


def send(signal: torch.Tensor) -> None:
    dist.send(encode(DUE, (8,), torch.float32), 1)
    dist.send(torch.zeros(5), 1)
    dist.send(encode(DUE, (8,), torch.float32)[:9], 1)
    Transport(torch.device("cpu")).send(signal, torch.tensor(False), 1, DUE)
    dist.send(encode(DUE, (8,), torch.float32), 1)
    try:
        dist.send(torch.zeros(500_000), 1)
        Transport(torch.device("cpu")).receive(1, DUE, Expected.like(signal))
    except RuntimeError as error:
        print("lost:", is_lost_connection(error))


def receive(signal: torch.Tensor) -> None:
    def receive_one() -> torch.Tensor:
        return Transport(torch.device("cpu")).receive(0, DUE, Expected.like(signal))[0]

    for _ in range(2):
        try:
            receive_one()
        except MalformedMessageError as error:
            print(error, flush=True)
    print("received", receive_one().tolist(), flush=True)
    print("received", receive_one(), flush=True)


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60))
    install(TorchWire(timedelta(seconds=60)))
    (receive if rank else send)(torch.ones(8))


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nfrom {__name__} import main\nmain(int(sys.argv[1]), {str(tmp_path / 'store')!r})")
    said = [tmp_path / f"{rank}.out" for rank in range(2)]
    processes = [starting.start([str(script), str(rank)], starting.clean_environment(), tmp_path, said[rank]) for rank in range(2)]
    try:
        codes = [starting.wait(process, 50) for process in processes]
    finally:
        for process in processes:
            starting.stop(process)
    sent, received = (path.read_text() for path in said)
    assert codes == [0, -signals.SIGABRT], (sent, received)
    lines = [line for line in received.splitlines() if line.strip()]
    # A shorter message is noticed by us alone, and does no harm to the one after it.
    (short,) = [line for line in lines if "has fewer elements than the 9 of shape (8,)" in line]
    (negative,) = [line for line in lines if "must not be negative" in line]
    (whole,) = [line for line in lines if line.startswith("received")]
    assert lines.index(short) < lines.index(negative) < lines.index(whole) and whole == f"received {[1.0] * 8}"
    # A longer one ends the process of the receiver, whose peer sees it as lost.
    assert "Received data size doesn't match expected size" in received
    assert [line for line in sent.splitlines() if line.startswith("lost")] == ["lost: True"]
