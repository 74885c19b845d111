"""Ranks that reach each other's memory: threads of one process, or processes of one host."""

from collections.abc import Callable, Sequence
from typing import Any

from phalanx import _native


class Owner:
    """Of a number in the module, given back when it dies: a copy would give back another's."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} belongs to its process; expected one made there")


class Group(Owner):
    """One of the ranks that reach each other's memory. Made by `local`, `from_torch`, `process` or `nccl`.

    Operations on a group are collective: every rank makes the same calls in the same order. A rank waits `timeout`
    seconds for another, then raises PeerTimeoutError, which names the ranks and what was awaited. After that the group
    is of no use but to be closed; the CUDA context is healthy, and a new group may be made.
    """

    def __init__(self, number: int):
        self._number = number
        self.rank, self.size, ordinal = _native.group_info(number)
        self.device = "cpu" if ordinal < 0 else f"cuda:{ordinal}"

    @staticmethod
    def local(devices: int | Sequence[Any], timeout: float = 30.0) -> list["Group"]:
        """Ranks that are threads of this process, one for each device; a number means that many on the CPU.

        devices:  "cpu", or "cuda:0", torch.device("cuda", 1) or an ordinal for each rank; a GPU may come several times
        """
        ordinals = [-1] * devices if isinstance(devices, int) else [_ordinal(device) for device in devices]
        return [Group(number) for number in _native.group_local(tuple(ordinals), timeout)]

    @staticmethod
    def process(
        rank: int, size: int, device: Any, all_gather: Callable[[bytes], Sequence[bytes]], timeout: float = 30.0
    ) -> "Group":
        """One process a GPU, on one host. `all_gather(mine)` returns every rank's bytes; any means will do."""

        def gather(mine):
            return [bytes(theirs) for theirs in all_gather(bytes(mine))]

        return Group(_native.group_process(rank, size, _ordinal(device), gather, timeout))

    @staticmethod
    def from_torch(process_group: Any = None, device: Any = None, timeout: float = 30.0) -> "Group":
        """Over a torch.distributed group, by default the whole world; `device`: by default the current CUDA device.

        Here, in `barrier`, and where an ExpertParallel is made, ranks wait as long as that group's own timeout.
        """
        import torch
        import torch.distributed as dist

        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)

        def all_gather(mine):
            everyone = [None] * size
            dist.all_gather_object(everyone, mine, group=process_group)
            return everyone

        device = torch.cuda.current_device() if device is None else device
        return Group.process(rank, size, device, all_gather, timeout)

    @staticmethod
    def nccl(id: bytes, rank: int, size: int, device: Any, timeout: float = 30.0) -> "Group":
        """Over a communicator of its own, made from an id that one rank got from `nccl_id()` and spread.

        Waits for all ranks as long as `timeout`, but at least 30 s, and raises PeerTimeoutError then.
        """
        return Group(_native.group_nccl(id, rank, size, _ordinal(device), timeout))

    @staticmethod
    def from_nccl(comm: int, timeout: float = 30.0) -> "Group":
        """Over an ncclComm_t, given as its address, which must outlive the group."""
        return Group(_native.group_nccl_comm(comm, timeout))

    @staticmethod
    def nccl_id() -> bytes:
        return bytes(_native.nccl_id())

    def barrier(self) -> None:
        """Until every rank has come."""
        _native.group_barrier(self._number)

    def abort(self) -> None:
        """Whoever waits, or will wait, in this group gives up with AbortedError. Callable from any thread.

        Other processes hear of it in dispatch and combine; what they wait for on the host ends by its timeout.
        """
        _native.group_abort(self._number)

    def close(self) -> None:
        """Leaves the group; further calls raise AbortedError.

        Between processes synchronise every rank's streams and pass a `barrier` before, and before each
        `ExpertParallel.close`.
        """
        _native.group_close(self._number)

    def __del__(self):
        if (number := getattr(self, "_number", None)) is not None:
            _native.group_release(number)

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.size}, {self.device})"


def _ordinal(device: Any) -> int:
    """Of a CUDA device; -1 for the CPU."""
    kind, _, ordinal = f"cuda:{device}".partition(":") if isinstance(device, int) else str(device).partition(":")
    if kind not in ("cpu", "cuda") or not (ordinal or "0").isdecimal():
        raise ValueError(f"device: {device!r}; expected cpu, cuda, cuda:<ordinal> or an ordinal")
    return -1 if kind == "cpu" else int(ordinal or 0)
