"""Processes that meet, for what ranks do together."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

RANKS = 2

# Each process is forked from one that has imported what takes seconds, and has run nothing yet.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fast_prompt.search", "torch.distributed", "transformers.models.bert.modeling_bert"])


def together(function, meeting):
    """What ``function(rank)`` returns in each of two processes of one group; ``meeting`` is a file yet to be made."""
    with ProcessPoolExecutor(RANKS, mp_context=CONTEXT) as pool:
        ranks = [pool.submit(_in_the_group, function, rank, str(meeting)) for rank in range(RANKS)]
        return [rank.result(timeout=120) for rank in ranks]


def _in_the_group(function, rank, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    try:
        return function(rank)
    finally:
        dist.destroy_process_group()
