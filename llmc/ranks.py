"""What the processes of one run do together on the host, over a store that all of them reach."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llmc.errors import RunError

if TYPE_CHECKING:
    from torch.distributed import Store

# Only a live rank makes the others wait, such as one that writes a large checkpoint: dead ones are seen by watch.py.
TIMEOUT = timedelta(minutes=30)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass
class Ranks:
    """One of `size` processes, or the only one. All ranks call the same methods in the same order.

    `what` names the operation in the RunError of a rank that waits in vain.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes on this machine,
    local_size: int = 1  # which are so many
    store: "Store | None" = field(default=None, repr=False)  # None for a single process
    group_name: str = ""  # of the Gloo group of all ranks, for the core; "" for a single process
    _operations: int = field(default=0, init=False)

    def barrier(self, what: str) -> None:
        """Return when all ranks have come here."""
        self.gather(None, what)

    def mean(self, value: float, what: str) -> float:
        """Mean over the ranks in fp64: the same bits on all of them."""
        return float(sum(self.gather(value, what))) / self.size

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's JSON-able value; those of the others do not count."""
        return self.gather(value if self.rank == 0 else None, what)[0]

    def agree(self, what: str, value: Any) -> None:
        """RunError on all ranks if a rank's JSON-able value differs from rank 0's."""
        values = self.gather(value, what)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise RunError(f"the ranks do not agree on {what}: {values[0]} on rank 0, {other} on rank {rank}")

    def first_problem(self, problem: str, what: str) -> str:
        """That of the lowest rank that has one, on all ranks; '' if none has."""
        return next((str(found) for found in self.gather(problem, what) if found), "")

    def problem_of_rank_0(self, what: str, function: Callable[..., Any], *arguments: Any) -> str:
        """Only rank 0 calls it; the text of its RunError, on all ranks, or ''."""
        problem = ""
        if self.rank == 0:
            try:
                function(*arguments)
            except RunError as error:
                problem = str(error)
        return self.first_problem(problem, what)

    def gather(self, value: Any, what: str) -> list[Any]:
        """The JSON-able values of all ranks, on each of them.

        Rank 0 collects them and answers with the list. Nothing stays in the store but the newest answer: that all ranks
        are in this operation tells that they have read the one before.
        """
        text = json.dumps(value)
        if self.store is None:
            return [json.loads(text)]
        self._operations += 1
        answer = f"{self._operations}"
        waits_for = 0
        try:
            if self.rank > 0:
                self.store.set(f"{answer}/{self.rank}", json.dumps([what, text]))
                return list(json.loads(self.store.get(answer)))
            texts = [text]
            for waits_for in range(1, self.size):
                key = f"{answer}/{waits_for}"
                their_what, their_text = json.loads(self.store.get(key))
                if their_what != what:
                    raise RunError(f"the ranks are out of step: {what} on rank 0, {their_what} on rank {waits_for}")
                texts.append(their_text)
                self.store.delete_key(key)
            self.store.set(answer, f"[{', '.join(texts)}]")
            self.store.delete_key(f"{self._operations - 1}")
            return list(json.loads(f"[{', '.join(texts)}]"))
        except RuntimeError as error:  # torch's: no answer in time, or no connection
            raise RunError(f"{what}: no answer from rank {waits_for}: {str(error).splitlines()[0]}") from error


def join_gloo_group(store: "Store", rank: int, size: int, one_machine: bool, seconds: float) -> str:
    """Make torch's default process group, with Gloo, within `seconds`; its name.

    `one_machine`: all ranks are on this one. RunError if they cannot connect.
    """
    from torch import distributed
    from torch.distributed import distributed_c10d

    if one_machine:  # works where the name of the machine cannot be resolved
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    timeout = timedelta(seconds=max(1.0, seconds))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
            distributed_c10d._set_pg_timeout(TIMEOUT)
    except RuntimeError as error:
        raise RunError(
            f"the ranks do not reach each other through Gloo: {str(error).splitlines()[0]}; "
            "name the network interface between the machines in GLOO_SOCKET_IFNAME"
        ) from error
    group = distributed.group.WORLD
    assert group is not None
    return group.group_name
