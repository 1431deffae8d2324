"""Work on rows that several processes share, in order; one process does it all."""

import torch
from accelerate import Accelerator
from torch import Tensor


def share(count: int, rank: int, processes: int) -> slice:
    """Process r of R takes rows [r count // R, (r + 1) count // R), possibly none."""
    return slice(rank * count // processes, (rank + 1) * count // processes)


def place(accelerator: Accelerator | None) -> tuple[int, int]:
    """The rank of this process and the number of them; without an accelerator, this one alone."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


def gather(rows: Tensor, count: int, accelerator: Accelerator | None) -> Tensor:
    """The shares of all processes, joined on each of them: (n, ...) to (count, ...)."""
    _, processes = place(accelerator)
    if accelerator is None or processes == 1:
        return rows
    padded = rows.new_zeros(-(-count // processes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = accelerator.gather(padded.to(accelerator.device)).unflatten(0, (processes, -1))
    shares = [share(count, rank, processes) for rank in range(processes)]
    joined = torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])
    return joined.to(rows.device)


def all_agree(holds: bool, accelerator: Accelerator | None) -> bool:
    """Whether it holds for every process, as that a file is there, which each reads by itself."""
    if accelerator is None or accelerator.num_processes == 1:
        return holds
    votes = torch.tensor(int(holds), device=accelerator.device)
    return int(accelerator.reduce(votes, "sum")) == accelerator.num_processes
