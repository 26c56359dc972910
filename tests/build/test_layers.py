"""The rules of the layout that a machine can check: layers, an op's files, docstrings, cheap import."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fast_prompt

ROOT = Path(__file__).parents[2]

# From the ground up: a layer imports what lies below it, never what lies above.
LAYERS = [
    ("tolerances", "figures", "reference"),
    ("backends",),
    ("ops",),
    ("nn",),
    ("tuning",),
    ("models",),
    ("methods",),
    ("search",),
    ("parity", "bench", "cost", "demo"),
    ("cli",),
]
HEAVY = ("transformers", "triton", "peft", "sklearn", "matplotlib", "fast_prompt_kernels")


def layer_of(module):
    """Position in LAYERS of a dotted name's layer; None for the package's own file."""
    return next((level for level, names in enumerate(LAYERS) if module.split(".")[1] in names), None)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    return sorted(path for path in (ROOT / "fast_prompt").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_layer_imports_upwards(path):
    own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:  # the package itself gathers every layer's public names
        assert path.name in ("__init__.py", "__main__.py")
        return
    for imported in imports_of(path):
        if imported.startswith("fast_prompt."):
            level = layer_of(imported)
            if level is None:  # the package's own public names come from every layer up to the search
                level = layer_of("fast_prompt.search")
            assert level <= own, f"imports {imported} from a layer above"


def test_every_op_has_its_files():
    for op in (name for name in fast_prompt.ops.__all__ if name.islower() and name != "explain"):
        for file in (
            f"fast_prompt/reference/{op}.py",
            f"fast_prompt/ops/{op}.py",
            f"csrc/cpu/{op}.cpp",
            f"csrc/cuda/{op}.cu",
            f"csrc/cuda/{op}_backward.cu",
            f"kernels/fast_prompt_kernels/{op}.py",
        ):
            assert (ROOT / file).exists(), f"{op} has no {file}"
        definition, api = getattr(fast_prompt.reference, op), getattr(fast_prompt.ops, op)
        places = {"inplace"}  # where a result goes is no part of what it is
        named = [each for each in inspect.signature(api).parameters.values() if each.name not in places]
        assert named == list(inspect.signature(definition).parameters.values())


def test_import_is_cheap():
    script = f"import sys, fast_prompt; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


PUBLIC_PACKAGES = (
    "fast_prompt",
    "fast_prompt.ops",
    "fast_prompt.nn",
    "fast_prompt.reference",
    "fast_prompt.search",
    "fast_prompt.tuning",
)


def public_objects():
    for package in PUBLIC_PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, str):
                yield pytest.param(value, id=f"{package}.{name}")


@pytest.mark.parametrize("value", list(public_objects()))
def test_public_names_are_documented(value):
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(member) or inspect.getdoc(getattr(super(value, value), name, None)), name
