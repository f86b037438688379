"""What the ranks of a run do together, through torch.distributed: NCCL between GPUs, gloo between CPUs.

`ALONE` stands for a run of one process: its methods do nothing and cost nothing. Everything here is a collective unless
it says otherwise: all ranks call it, in the same order.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastcifar import interrupt
from fastcifar.data.batch import Share
from fastcifar.errors import UserError
from fastcifar.launch import LostRankError, Place

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long ranks wait for each other, where one of them may be converting a large data set, or compiling alone."""


@dataclass(eq=False)
class Ranks:
    """The ranks of a run, seen from one of them.

    Attributes:
        place: which one.
        control: the group for what the hosts say to each other, always gloo; None for a single process.
        data: the group for tensors on the device; see `on`.
    """

    place: Place = field(default_factory=Place)
    control: Any = None
    data: Any = None
    _vote: tuple[Any, Tensor] | None = None
    _parent: int = field(default_factory=os.getppid)

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.place.world

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reads and writes the run directory and shows the progress."""
        return self.place.rank == 0

    def on(self, device: torch.device) -> "Ranks":
        """Return the same ranks, ready for tensors on their devices."""
        if self.world == 1:
            return self
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Said again, for a new group does not take over the first one's: NCCL's own limit is ten minutes.
        return replace(self, data=dist.new_group(backend=backend, timeout=PATIENCE))

    # ---------------------------------------------------------------------------------------------------------- tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, in place: the same bits on each of them. Returns it.

        On a GPU nothing waits for the host, and the call can be captured in a CUDA graph.
        """
        if self.world > 1:
            with lost_rank_named():
                dist.all_reduce(tensor, group=self.data)
        return tensor

    def mean(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the ranks, in place; elements that are the same everywhere keep their bits.

        The first rank's values are the origin, so that equal ones differ from it by exactly 0.
        """
        if self.world > 1:
            # The plain sum / world would round values that all ranks share, and move them a little every epoch.
            origin = tensor.clone()
            self.broadcast([origin])
            tensor.copy_(origin + self.sum(tensor - origin) / self.world)

    def assemble(self, part: Tensor, share: Share) -> Tensor:
        """Return the whole of which each rank has a part, bit for bit: (total, ...) from (count, ...), contiguous.

        Args:
            part: any dtype; rows ``share.first`` to ``share.first + count`` of the whole.
            share: where the part lies.
        """
        whole = part.new_zeros((share.total, *part.shape[1:]))
        whole[share.first : share.first + len(part)] = part
        # Summed as bytes: where one rank has something, all others have 0.
        self.sum(whole.view(torch.uint8))
        return whole

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's tensors over those of the others, in place.

        A padded weight is a view with holes: NCCL refuses these, and gloo copies other memory than the tensor's.
        """
        for tensor in tensors if self.world > 1 else ():
            dense = tensor.detach().clone()  # dense in the tensor's own order of dimensions, which all ranks share
            with lost_rank_named():
                dist.broadcast(dense, 0, group=self.data)
            tensor.detach().copy_(dense)

    def require_same(self, tensor: Tensor, what: str) -> None:
        """Make sure that a float32 tensor has the same bits on all ranks. Waits for the device.

        Raises:
            UserError: it has not.
        """
        if self.world > 1:
            # A sum of the bits as integers: exact in any order, and eight bytes to compare instead of all.
            own = tensor.view(torch.int32).sum(dtype=torch.int64).reshape(1).cpu()
            if len({int(sums) for sums in self.gather(own)}) > 1:
                raise UserError(
                    f"{what} differ between the ranks: they compute differently. Use machines of one kind, with the "
                    "same packages and OMP_NUM_THREADS"
                )

    # -------------------------------------------------------------------------------------------------- between hosts

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the ranks' tensors, of one shape and on the CPU, rank by rank."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        with lost_rank_named():
            dist.all_gather(parts, tensor, group=self.control)
        return parts

    def from_first(self, value: T) -> T:
        """Return rank 0's value, pickled: plain values, arrays and tensors on the CPU."""
        if self.world == 1:
            return value
        values = [value]
        with lost_rank_named():
            dist.broadcast_object_list(values, 0, group=self.control, device=torch.device("cpu"))
        return values[0]

    def wait_for_all(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            with lost_rank_named():
                dist.barrier(group=self.control)

    @contextmanager
    def one_per_host_first(self) -> Iterator[None]:
        """Let the first rank of each host do the block before the others: what it puts into a cache, they find."""
        if self.place.local_rank:
            self.wait_for_all()
        yield
        if not self.place.local_rank:
            self.wait_for_all()

    # --------------------------------------------------------------------------------------------------------- stopping

    def stopping(self) -> bool:
        """Tell, after each step, whether a signal to any rank asks to stop; all ranks give the same answer at once.

        Each rank sends what it knows and takes the sum that was sent for a step before, so that neither the hosts nor
        the devices wait for each other: a stop comes one step late. `interrupt.requested` is set on all ranks then.
        """
        if self.world == 1:
            return interrupt.requested() is not None
        before, self._vote = self._vote, self._sent()
        return before is not None and self._counted(before)

    def settled(self) -> bool:
        """Tell, between epochs, whether a signal has asked any rank to stop, without the delay of `stopping`."""
        if self.world == 1:
            return interrupt.requested() is not None
        before, self._vote = self._vote, None
        earlier = before is not None and self._counted(before)
        return self._counted(self._sent()) or earlier

    def _sent(self) -> tuple[Any, Tensor]:
        """Send the number of the signal that came, or 0; a rank without its launcher asks for an end, too."""
        # A rank whose launcher was killed would wait for ever and keep its GPU.
        orphan = os.getppid() != self._parent
        number = torch.tensor([interrupt.requested() or (interrupt.SIGNALS[1] if orphan else 0)])
        return dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control, async_op=True), number

    @staticmethod
    def _counted(vote: tuple[Any, Tensor]) -> bool:
        work, number = vote
        with lost_rank_named():
            work.wait()
        if int(number):
            interrupt.request(int(number))
        return bool(number)


ALONE = Ranks()
"""A run of one process."""


def join(here: Place, store: Any) -> Ranks:
    """Meet the other ranks; none goes on before all are here.

    Args:
        here: this one's place.
        store: of `fastcifar.launch.one_voice`; None for a single process.
    """
    if here.world == 1:
        return ALONE
    with lost_rank_named():
        dist.init_process_group("gloo", store=store, rank=here.rank, world_size=here.world, timeout=PATIENCE)
    return Ranks(here, control=dist.group.WORLD)


def leave() -> None:
    """Take leave of the other ranks, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_rank_named() -> Iterator[None]:
    """Raise a `LostRankError` where a collective fails: all of them are right or fail because a rank has gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(str(error)) from error
