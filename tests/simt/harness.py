"""Builds csrc/cuda with a C++ compiler against the SIMT headers here, and calls it with tensors."""

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch

from fast_prompt.reference.skip_adapter import ACTIVATIONS, NORMS, RESIDUALS

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FLAGS = "-std=c++17 -O2 -march=native -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi"


def compile_modules(elements, op="prompt_diffusion", sources=SOURCES, build=BUILD):
    """Builds an op's modules, one per element type, of what has changed, and imports them."""
    build = build / op
    build.mkdir(parents=True, exist_ok=True)
    includes = [SIMT / "include", SIMT, sources, pybind11.get_include(), sysconfig.get_path("include")]
    lines = [
        f"flags = {FLAGS} {' '.join(f'-I{path}' for path in includes)}",
        "rule compile",
        "  command = c++ $flags $defines -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = c++ -shared $in -o $out",
        f"build simt.o: compile {SIMT / 'simt.cpp'}",
    ]
    for element in elements:
        name = module_name(op, element, build)
        lines += [
            f"build {element}.bind.o: compile {SIMT / f'bind_{op}.cpp'}",
            f"  defines = -DFAST_PROMPT_ELEMENT={element} -DSIMT_MODULE={name}",
        ]
        objects = [f"{element}.{source.stem}.o" for source in sorted(sources.glob(f"{op}*.cu"))]
        for source, target in zip(sorted(sources.glob(f"{op}*.cu")), objects, strict=True):
            lines += [f"build {target}: compile {source}", f"  defines = -DFAST_PROMPT_ELEMENT={element}"]
        lines.append(f"build {name}.so: link {' '.join(objects)} {element}.bind.o simt.o")
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", build]
    with (build / "lock").open("w") as lock:  # several test processes may want the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    return {element: import_module(module_name(op, element, build), build) for element in elements}


def compile_planted(element, name, file, right, wrong, op="prompt_diffusion"):
    """The module of one element type with a bug: in ``file``, ``right``, which stands there once, made ``wrong``."""
    build = BUILD / "planted" / name / op
    sources = build / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.iterdir():
        text = source.read_text()
        if source.name == file:
            assert text.count(right) == 1, f"{file}: found {text.count(right)} times: {right}"
            text = text.replace(right, wrong)
        target = sources / source.name
        if not target.exists() or target.read_text() != text:  # an unchanged file keeps its time: nothing to build
            target.write_text(text)
    return compile_modules([element], op, sources, build.parent)[element]


def module_name(op, element, build):
    planted = "" if build.parent == BUILD else f"_{build.parent.name}"
    return f"simt_{op}_{element}{planted}"


def import_module(name, build):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, build / f"{name}.so")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def has_compiler():
    return shutil.which("c++") is not None


class Backend:
    """The emulated kernels behind the functions of a backend (fast_prompt/backends), by the activations' dtype."""

    def __init__(self, modules):
        self.modules = modules

    def configure(self, **settings):
        """Sets ``simt.h``'s Settings for every module."""
        for module in self.modules.values():
            for name, value in settings.items():
                setattr(module.settings(), name, value)

    def prompt_diffusion(self, hidden, *inputs):
        given, _alive = diffusion_arguments(hidden, *inputs)
        output = Guarded(hidden.shape, hidden.dtype)
        self.modules[ELEMENTS[hidden.dtype]].prompt_diffusion(output.address, **given)
        return output.checked()

    def prompt_diffusion_backward(self, grad, hidden, source, prompts, keys, log_scale, *options_and_needs):
        *options, needs = options_and_needs
        given, _alive = diffusion_arguments(hidden, source, prompts, keys, log_scale, *options)
        results = gradients_of((source, source, prompts, keys, log_scale), needs)
        module = self.modules[ELEMENTS[source.dtype]]
        module.prompt_diffusion_backward(rows(grad), *map(address, results), **given)
        return tuple(result.checked() if result else None for result in results)

    def prompt_compress(self, query, visual, *inputs_and_keep):
        *inputs, keep_probabilities, keep_attended = inputs_and_keep
        given, _alive = compress_arguments(query, visual, *inputs)
        shape = torch.Size([given["batch"], given["heads"], given["queries"]])
        results = (
            Guarded(query.shape, query.dtype),
            Guarded(shape, torch.float32),
            Guarded(shape + visual.shape[1:2], torch.float32) if keep_probabilities else None,
            Guarded(shape + visual.shape[2:3], torch.float32) if keep_attended else None,
        )
        self.modules[ELEMENTS[query.dtype]].prompt_compress(*map(address, results), **given)
        return tuple(result.checked() if result else None for result in results)

    def prompt_compress_backward(self, grad, *inputs_and_kept):
        *inputs, _logsumexp, probabilities, attended, needs = inputs_and_kept
        given, _alive = compress_arguments(*inputs)
        results = gradients_of(inputs[:5], needs)
        kept = (0 if tensor is None else tensor.data_ptr() for tensor in (probabilities, attended))
        module = self.modules[ELEMENTS[grad.dtype]]
        module.prompt_compress_backward(rows(grad), *kept, *map(address, results), **given)
        return tuple(result.checked() if result else None for result in results)

    def skip_adapter(self, output, *inputs_and_keep):
        *inputs, keep_hidden = inputs_and_keep
        given, _alive = skip_arguments(*inputs)
        shape = torch.Size([1 if given["route"] else given["adapters"], *output.shape[:2], given["hidden_width"]])
        hidden = Guarded(shape, output.dtype) if keep_hidden else None
        self.modules[ELEMENTS[output.dtype]].skip_adapter(output.data_ptr(), address(hidden), **given)
        return hidden.checked() if keep_hidden else None

    def skip_adapter_backward(self, grad, *inputs_and_needs):
        *tensors_and_seed, hidden, norm, activation, residual, eps, dropout_p, needs = inputs_and_needs
        given, _alive = skip_arguments(*tensors_and_seed, norm, activation, residual, eps, dropout_p)
        results = gradients_of(tensors_and_seed[:9], needs)
        module, grad = self.modules[ELEMENTS[grad.dtype]], unit_stride(grad)
        module.skip_adapter_backward(rows(grad), hidden.data_ptr(), list(map(address, results)), **given)
        return tuple(result.checked() if result else None for result in results)


class Guarded:
    """Memory for a result, NaN at first, between NaNs that must still be there afterwards."""

    MARGIN = 64

    def __init__(self, shape, dtype):
        self.shape, self.count = shape, shape.numel()
        self.memory = torch.full((self.count + 2 * self.MARGIN,), torch.nan, dtype=dtype)
        skip = -self.memory.data_ptr() // self.memory.element_size() % (16 // self.memory.element_size())
        self.first = self.MARGIN // 2 + skip  # a multiple of 16 bytes, as torch gives
        self.address = self.memory.data_ptr() + self.first * self.memory.element_size()

    def checked(self):
        end = self.first + self.count
        outside = torch.cat([self.memory[: self.first], self.memory[end:]])
        assert outside.isnan().all(), "written outside of the result"
        return self.memory[self.first : end].view(self.shape)


def gradients_of(tensors, needs):
    return [
        Guarded(tensor.shape, tensor.dtype) if needed else None for tensor, needed in zip(tensors, needs, strict=True)
    ]


def address(result):
    return result.address if result else 0


def rows(tensor):
    """A tensor as csrc/cuda's Rows: address, rows per batch, batch stride, row stride."""
    if tensor is None:
        return 0, 1, 0, 0
    assert tensor.stride(-1) == 1 or tensor.size(-1) == 1
    batch_stride = tensor.stride(0) if tensor.dim() == 3 else 0
    return tensor.data_ptr(), tensor.size(-2), batch_stride, tensor.stride(-2)


def unit_stride(tensor):
    """As the Python side of the bindings passes tensors on: copied where a row's elements are not neighbours."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def diffusion_arguments(hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p):
    """csrc/cuda's PromptDiffusion, and the tensors that must outlive the call."""
    given = {
        "rows": source.shape[0] * source.shape[1],
        "width": source.shape[2],
        "num_prompts": prompts.shape[0],
        "hidden": rows(hidden),
        "source": rows(source),
        "prompts": rows(prompts),
        "keys": rows(keys),
        "float_weights": prompts.dtype == torch.float32,
        "log_scale": log_scale.data_ptr(),
        "softmax": activation == "softmax",
        "max_weight": row_weight == "max",
        **dropout(seed, dropout_p),
    }
    return given, (hidden, source, prompts, keys, log_scale, seed)


def compress_arguments(
    query, visual, key_weight, value_weight, value_bias, key_padding_mask, seed, num_heads, dropout_p
):
    """csrc/cuda's PromptCompress, and the tensors that must outlive the call."""
    mask = key_padding_mask
    given = {
        "batch": query.shape[0],
        "queries": query.shape[1],
        "tokens": visual.shape[1],
        "heads": num_heads,
        "head_width": query.shape[2] // num_heads,
        "visual_width": visual.shape[2],
        "query": rows(query),
        "visual": rows(visual),
        "key_weight": rows(key_weight),
        "value_weight": rows(value_weight),
        "value_bias": 0 if value_bias is None else value_bias.data_ptr(),
        "float_weights": key_weight.dtype == torch.float32,
        "padding": (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()),
        **dropout(seed, dropout_p),
    }
    return given, (query, visual, key_weight, value_weight, value_bias, mask, seed)


def skip_arguments(
    x,
    down_weight,
    up_weight,
    down_bias,
    up_bias,
    norm_weight,
    norm_bias,
    scale,
    gates,
    route,
    seed,
    norm,
    activation,
    residual,
    eps,
    dropout_p,
):
    """csrc/cuda's SkipAdapter, and the tensors that must outlive the call."""
    experts = 1 if gates is None else gates.shape[1]
    matrices = {
        "x": x,
        "down_weight": down_weight,
        "up_weight": up_weight,
        "down_bias": down_bias,
        "up_bias": up_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    matrices = {name: unit_stride(tensor) for name, tensor in matrices.items()}
    vectors = {"scale": scale, "gates": gates, "route": route}
    vectors = {name: None if tensor is None else tensor.contiguous() for name, tensor in vectors.items()}
    given = {
        "batch": x.shape[0],
        "rows": x.shape[1],
        "width": x.shape[2],
        "hidden_width": down_weight.shape[1],
        "adapters": down_weight.shape[0],
        "experts": experts,
        "groups": experts * down_weight.shape[1] // up_weight.shape[2],
        **{name: rows(tensor) for name, tensor in matrices.items()},
        "float_weights": down_weight.dtype == torch.float32,
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in vectors.items()},
        "norm": list(NORMS).index(norm),
        "activation": list(ACTIVATIONS).index(activation),
        "residual": list(RESIDUALS).index(residual),
        "eps": eps,
        **dropout(seed, dropout_p),
    }
    return given, (*matrices.values(), *vectors.values(), seed)


def dropout(seed, dropout_p):
    return {
        "seed": seed.data_ptr() if dropout_p else 0,
        "dropout_threshold": min(round(dropout_p * 2**32), 2**32 - 1),
        "kept_scale": 1 / (1 - dropout_p),
    }
