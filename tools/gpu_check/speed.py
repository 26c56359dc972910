"""The steps that time: every contender of ``fast_prompt.bench``, and beside it what this card could do at best."""

from collections.abc import Callable

from fast_prompt import bench
from fast_prompt.bench.runner import measure
from gpu_check.outcome import Figures, StepError
from gpu_check.place import Place

DTYPE = "bf16"


def cold(place: Place, figures: Figures, op: str) -> None:
    """Inputs out of the cache, replayed from CUDA graphs."""
    _time(place, figures, op, place.shapes(op), place.cold_bytes())


def tuned(place: Place, figures: Figures, op: str) -> None:
    """The same for the largest batch alone: for a process in which torch.compile tries every tile (max-autotune)."""
    _time(place, figures, op, _of_batch(max, place, op), place.cold_bytes())


def launched(place: Place, figures: Figures, op: str) -> None:
    """The smallest batch, call after call: what launches cost counts too."""
    _time(place, figures, op, _of_batch(min, place, op), 0)


def _of_batch(choose: Callable[[list[int]], int], place: Place, op: str) -> list[dict[str, int]]:
    """The shapes with the batch that ``choose`` chooses."""
    shapes = place.shapes(op)
    batch = choose([shape["B"] for shape in shapes])
    return [shape for shape in shapes if shape["B"] == batch]


def _time(place: Place, figures: Figures, op: str, shapes: list[dict[str, int]], cold_bytes: int) -> None:
    figures.save(cold_bytes=cold_bytes, gemm_tflops=0.0, copy_gb_s=0.0, rows=[], raised=[])
    wrong = []
    for name in bench.OPS[op].PASSES:
        for shape in shapes:
            setting = bench.Setting(op, shape, DTYPE, name)
            rows, best, raised = measure(setting, place.device, place.rounds, cold_bytes=cold_bytes)
            figures.save(
                gemm_tflops=max(figures["gemm_tflops"], best.flops / 1e12),
                copy_gb_s=max(figures["copy_gb_s"], best.bytes / 1e9),
                rows=figures["rows"] + [row.as_json(with_saved_bytes=True) | {"failure": row.failure} for row in rows],
                raised=figures["raised"] + [entry._asdict() for entry in raised],
            )
            wrong += [f"{row.contender} {setting}: {row.failure}" for row in rows if row.kind == "ours" and row.failure]
            wrong += [f"{entry.contender} {setting}: {entry.message}" for entry in raised if entry.kind == "ours"]
    if wrong:
        raise StepError("\n".join(wrong))
