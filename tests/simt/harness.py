"""Builds csrc/cuda with a C++ compiler against the SIMT headers here, and calls it with tensors, through ctypes."""

import ctypes
import itertools
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_cache
import torch

from fast_prompt.reference.skip_adapter import ACTIVATIONS, NORMS, RESIDUALS

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Several libraries are in one process: nothing of one may stand in for what is called the same in another.
FLAGS = "-std=c++17 -fPIC -fno-gnu-unique -fno-semantic-interposition"
LEVEL = "-O1"  # compiles in half the time of -O2, and runs about as fast
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi"


# ---- Building, of what the cache does not have ----


def has_compiler():
    return shutil.which("c++") is not None


def sources_of(op):
    """The kernels' files, one for each direction: the forward first."""
    return sorted(SOURCES.glob(f"{op}*.cu"))


def build(op):
    """An op's library, with kernels of every element type."""
    kernels = itertools.product(sources_of(op), ELEMENTS.values())
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_kernels, *zip(*kernels, strict=True)))
    return link(objects)


def build_planted(op, file, right, wrong, element="bfloat16"):
    """The library of one element type with a bug: in ``file``, ``right``, which stands there once, made ``wrong``.

    A header that both directions include has it in the forward alone.
    """
    sources = sources_of(op)
    broken = next(source for source in sources if SOURCES / file in build_cache.closure([source], [SOURCES]))
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(shutil.copytree(SOURCES, folder, dirs_exist_ok=True))
        text = (copies / file).read_text()
        assert text.count(right) == 1, f"{file}: found {text.count(right)} times: {right}"
        (copies / file).write_text(text.replace(right, wrong))
        planted = compile_kernels(copies / broken.name, element)
    # First: of what both directions have, the linker takes the first.
    return link([planted, *(compile_kernels(source, element) for source in sources if source != broken)])


def compile_kernels(source, element):
    return compile_file(source, source.parent, LEVEL, f"-DFAST_PROMPT_ELEMENT={element}", "-x", "c++")


def compile_file(source, sources, *flags):
    includes = [SIMT / "include", SIMT, sources]
    command = ["c++", *f"{FLAGS} {WARNINGS}".split(), *(f"-I{path}" for path in includes), *flags]
    command += ["-c", str(source), "-o", "object.o"]
    return build_cache.cached(command, [source], includes) / "object.o"


def link(objects):
    emulator = [compile_file(SIMT / name, SOURCES, "-O3") for name in ("simt.cpp", "calls.cpp")]
    inputs = [*objects, *emulator]
    return build_cache.cached(["c++", "-shared", *map(str, inputs), "-o", "library.so"], inputs) / "library.so"


# ---- Calling: the structs are read from the headers ----

PLAIN = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "unsigned": ctypes.c_uint,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
}


def structs(*headers):
    """The headers' structs by their names, as ctypes has them."""
    text = "\n".join(re.sub(r"//.*", "", header.read_text()) for header in headers)
    text = re.sub(r"\w+\* \(\*(\w+)\)\(.*?\);", r"void* \1;", text)  # a pointer to a function, as any other
    types = PLAIN | dict.fromkeys(re.findall(r"enum class (\w+)", text), ctypes.c_int)
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        members = []
        for kind, names in re.findall(r"(?:const )?(\w+\b)([^;(]+);", body):
            for member in names.split(","):
                members.append((re.search(r"\w+", member)[0], ctypes.c_void_p if "*" in member else types[kind]))
        types[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return types


class Backend:
    """An op's emulated kernels behind the functions of a backend (fast_prompt/backends)."""

    def __init__(self, op, path):
        self.op, self.library = op, ctypes.CDLL(path)
        self.types = structs(SIMT / "simt.h", SOURCES / "runtime.h", SOURCES / f"{op}.h")
        self.library.simt_settings.restype = ctypes.POINTER(self.types["Settings"])
        self.library.simt_call.restype = ctypes.c_char_p
        self.settings = self.library.simt_settings().contents

    def configure(self, **settings):
        """Sets ``simt.h``'s Settings."""
        for name, value in settings.items():
            setattr(self.settings, name, value)

    def filled(self, name, members):
        """A struct of the headers with all of its members."""
        struct = self.types[name]
        assert members.keys() == {member for member, _ in struct._fields_}, name
        return struct(**members)

    def call(self, direction, element, given, results):
        """Calls a launcher; ``results`` are a struct's name and members, or an address."""
        name = "".join(part.title() for part in self.op.split("_"))  # the structs are called so
        launchers = self.types[f"{name}Kernels"].in_dll(self.library, mangled(element, self.op))
        launcher = ctypes.c_void_p(getattr(launchers, direction))
        given = ctypes.byref(self.filled(name, given))
        results = ctypes.c_void_p(results) if isinstance(results, int) else ctypes.byref(self.filled(*results))
        if (error := self.library.simt_call(launcher, given, results)) is not None:
            raise RuntimeError(error.decode())

    def prompt_diffusion(self, hidden, *inputs):
        given, _alive = diffusion_arguments(hidden, *inputs)
        output = Guarded(hidden.shape, hidden.dtype)
        self.call("forward", ELEMENTS[hidden.dtype], given, output.address)
        return output.checked()

    def prompt_diffusion_backward(self, grad, hidden, source, prompts, keys, log_scale, *options_and_needs):
        *options, needs = options_and_needs
        given, _alive = diffusion_arguments(hidden, source, prompts, keys, log_scale, *options)
        results = gradients_of((source, source, prompts, keys, log_scale), needs)
        gradients = named(("hidden", "source", "prompts", "keys", "log_scale"), results) | {"grad": rows(grad)}
        self.call("backward", ELEMENTS[source.dtype], given, ("PromptDiffusionGradients", gradients))
        return checked(results)

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
        members = named(("output", "logsumexp", "probabilities", "attended"), results)
        self.call("forward", ELEMENTS[query.dtype], given, ("PromptCompressResults", members))
        return checked(results)

    def prompt_compress_backward(self, grad, *inputs_and_kept):
        *inputs, _logsumexp, probabilities, attended, needs = inputs_and_kept
        given, _alive = compress_arguments(*inputs)
        results = gradients_of(inputs[:5], needs)
        gradients = named(("query", "visual", "key_weight", "value_weight", "value_bias"), results)
        gradients |= {"grad": rows(grad), "probabilities": data(probabilities), "attended": data(attended)}
        self.call("backward", ELEMENTS[grad.dtype], given, ("PromptCompressGradients", gradients))
        return checked(results)

    def skip_adapter(self, output, *inputs_and_keep):
        *inputs, keep_hidden = inputs_and_keep
        given, _alive = skip_arguments(*inputs)
        shape = torch.Size([1 if given["route"] else given["adapters"], *output.shape[:2], given["hidden_width"]])
        hidden = Guarded(shape, output.dtype) if keep_hidden else None
        members = {"output": data(output), "hidden": address(hidden)}
        self.call("forward", ELEMENTS[output.dtype], given, ("SkipAdapterResults", members))
        return hidden.checked() if keep_hidden else None

    def skip_adapter_backward(self, grad, *inputs_and_needs):
        *tensors_and_seed, hidden, norm, activation, residual, eps, dropout_p, needs = inputs_and_needs
        given, _alive = skip_arguments(*tensors_and_seed, norm, activation, residual, eps, dropout_p)
        results, grad = gradients_of(tensors_and_seed[:9], needs), unit_stride(grad)
        gradients = named((*SKIP_MATRICES, "scale", "gates"), results) | {"grad": rows(grad), "hidden": data(hidden)}
        self.call("backward", ELEMENTS[grad.dtype], given, ("SkipAdapterGradients", gradients))
        return checked(results)


def mangled(*names):
    """What a variable of csrc/cuda is called in a library."""
    return f"_ZN{''.join(f'{len(name)}{name}' for name in ('fast_prompt', 'cuda', *names))}E"


# ---- Tensors as the structs' members ----


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


def checked(results):
    return tuple(result.checked() if result else None for result in results)


def named(names, results):
    """The results' addresses by their names."""
    return dict(zip(names, map(address, results), strict=True))


def address(result):
    """Where a result goes; 0 where it is not wanted."""
    return result.address if result else 0


def data(tensor):
    return 0 if tensor is None else tensor.data_ptr()


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
        "value_bias": data(value_bias),
        "float_weights": key_weight.dtype == torch.float32,
        "padding": (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()),
        **dropout(seed, dropout_p),
    }
    return given, (query, visual, key_weight, value_weight, value_bias, mask, seed)


SKIP_MATRICES = ("x", "down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "norm_bias")
SKIP_VECTORS = ("scale", "gates", "route")


def skip_arguments(*inputs):
    """csrc/cuda's SkipAdapter, and the tensors that must outlive the call."""
    tensors, (seed, norm, activation, residual, eps, dropout_p) = inputs[:10], inputs[10:]
    matrices = dict(zip(SKIP_MATRICES, map(unit_stride, tensors[:7]), strict=True))
    vectors = (None if tensor is None else tensor.contiguous() for tensor in tensors[7:])
    vectors = dict(zip(SKIP_VECTORS, vectors, strict=True))
    x, down_weight, up_weight, *_ = matrices.values()
    experts = 1 if vectors["gates"] is None else vectors["gates"].shape[1]
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
        **{name: data(tensor) for name, tensor in vectors.items()},
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
