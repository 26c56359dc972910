"""An op is declared once; its registered forms, fake tensors, autograd and the choice of a backend come from that."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_prompt.backends import BACKENDS, Call, Kernels, choose, forced
from fast_prompt.ops import checks
from fast_prompt.ops.autocast import activation_dtype, autocast_dtype
from fast_prompt.ops.transforms import is_transformed, refuse_derivatives_of_backward

MOST_PLANS = 4096  # that are remembered, of an op


@dataclass(frozen=True)
class Argument:
    """A tensor of an op. ``activation``, ``weight``, ``scalars`` and ``index`` make them.

    Attributes:
        name: its name.
        role: ``"activation"``, all of one dtype, which autocast decides; ``"weight"``, all of one dtype, the
            activations' or float32; ``"scalars"``, floating, which kernels get as float32; ``"index"``, which has no
            gradient.
        optional: whether it may be None.
        gradient_shape: where the backward does without it: its shape, from the backward's arguments by name.
        planned: False for what is no argument of the op's checks: a seed, and what the op makes of its arguments.
    """

    name: str
    role: str
    optional: bool = False
    gradient_shape: Callable[..., Sequence[int]] | None = None
    planned: bool = True

    @property
    def schema(self) -> str:
        """Its part of a registered op's schema."""
        return f"Tensor{'?' * self.optional} {self.name}"

    @property
    def is_saved(self) -> bool:
        """Whether the backward needs it."""
        return self.gradient_shape is None


def activation(
    name: str, *, optional: bool = False, gradient_shape: Callable[..., Sequence[int]] | None = None
) -> Argument:
    """Rows that an op reads; the first one's dtype and device are the op's."""
    return Argument(name, "activation", optional, gradient_shape)


def weight(name: str, *, optional: bool = False) -> Argument:
    """A parameter, of the activations' dtype or float32."""
    return Argument(name, "weight", optional)


def scalars(name: str, *, optional: bool = False) -> Argument:
    """One number or a few, of any floating dtype."""
    return Argument(name, "scalars", optional)


def index(name: str, *, planned: bool = True) -> Argument:
    """A mask, a seed, a route: None, or a tensor that has no gradient."""
    return Argument(name, "index", optional=True, planned=planned)


@dataclass(frozen=True)
class Option:
    """An argument of an op that is no tensor. ``choice`` and ``number`` make them.

    Attributes:
        name: its name.
        type: how a schema spells its type.
        choices: what it may be, where it is one of several strings; registered ops take its place among them.
        registered: False for what only the choice of a form looks at.
    """

    name: str
    type: str
    choices: tuple[str, ...] = ()
    registered: bool = True

    @property
    def schema(self) -> str:
        """Its part of a registered op's schema."""
        return f"{self.type} {self.name}"

    def number(self, value: Any) -> Any:
        """The value as registered ops take it."""
        return self.choices.index(value) if self.choices else float(value) if self.type == "float" else value

    def value(self, number: Any) -> Any:
        """The value of which ``number`` was made."""
        return self.choices[number] if self.choices else number


def choice(name: str, choices: Sequence[str], *, registered: bool = True) -> Option:
    """One of several strings, in the order in which the C++ enum has them."""
    return Option(name, "int", tuple(choices), registered)


def number(name: str, kind: type = float) -> Option:
    """A float or an int."""
    return Option(name, kind.__name__)


class Plan:
    """What an op makes of all calls that are alike: how it runs them.

    Attributes:
        call: the facts.
        form: the backend's name; ``"reference"`` where the definition runs it, or the name of a form of the op's own.
    """

    def __init__(
        self,
        op: "Op",
        call: Call,
        form: str,
        casts: tuple[torch.dtype | None, ...],
        options: dict[str, Any],
        keep: list[bool],
    ) -> None:
        self.op, self.call, self.form, self.options, self.keep = op, call, form, options, keep
        self.numbers = tuple([option.number(options[option.name]) for option in op.options])
        self.casts = casts if any(casts) else None

    def cast(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """The op's first tensors in the dtypes that the kernels, or the definition, get."""
        if self.casts is None:
            return tensors
        pairs = zip(tensors, self.casts, strict=False)
        return tuple(tensor if dtype is None or tensor is None else tensor.to(dtype) for tensor, dtype in pairs)

    def define(self, *tensors: Tensor | None, **more: Any) -> Tensor:
        """What the definition makes of the op's first tensors, the options, and whatever ``more`` it takes."""
        return self.op.definition(*self.cast(*tensors), **self.options, **more)

    def run(self, *tensors: Tensor | None, overwrite: bool = False) -> Tensor:
        """The backend's result for all of the op's tensors, differentiable.

        Args:
            tensors: in the declaration's order.
            overwrite: whether the result may be written over the op's ``overwritten`` argument.

        Raises:
            ValueError: it may, but that argument is a leaf that trains, or shares its memory with another.
        """
        op = self.op
        tensors = self.cast(*tensors)
        if overwrite and not torch.compiler.is_compiling():  # which writes to no tensor but by copies that it makes
            op.check_overwritten(tensors)
        if torch.is_grad_enabled():
            # A custom Function costs as much as an op on few rows: only where a gradient may be asked for.
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return op.function.apply(self, overwrite, *tensors)
        return self.forward(overwrite, tensors, op.keep_nothing)[0]

    def forward(self, overwrite: bool, tensors: Sequence[Any], keep: Sequence[bool]) -> list[Tensor]:
        """The output, and what is kept of it, by the backend's registered op."""
        op = self.op
        if overwrite and tensors[op.over].is_contiguous():
            op.registered(self.form, "_")(*tensors, *self.numbers)
            if not torch.compiler.is_compiling() and not tensors[op.over].is_inference():
                # So that autograd sees it where the values before were saved for another backward pass.
                torch.autograd.graph.increment_version(tensors[op.over])
            return [tensors[op.over]]
        if op.kept:
            return op.registered(self.form, "")(*tensors, *self.numbers, keep)
        return op.registered(self.form, "")(*tensors, *self.numbers)


class Op:
    """An op: its registered forms, autograd, the choice of a backend.

    For every backend there are three registered ops, or two: ``<op>``, which returns the output and then what it keeps;
    ``<op>_``, which writes the output over an argument; and ``<op>_backward``, which returns the gradients that are
    needed. Those of the compiled library have these names, their kernels the dispatch keys CPU and CUDA; another
    backend's have its suffix.

    Args:
        api: the function that users call, which plans and runs the op; its name is the op's.
        definition: the same in plain PyTorch, which says what is right: of the tensors, the options by name, and a seed
            or what else it takes.
        tensors: its tensors, in the order of all that takes them.
        options: its other arguments.
        check: raises where planned arguments, by position, do not go together; it may read no more of a tensor than
            its shape, dtype, device and layout. Dtypes and choices need no check of its own.
        sizes: the sizes that a backend may choose by, from the planned arguments by name.
        results: new tensors like the output and what is kept, from the registered op's arguments by name and the
            backend's; kept ones are there where ``keep`` says so.
        kernels: what each backend has for it.
        kept: names of what a forward may keep for its backward.
        keep: which of these, from the tensors and options by name; all where it is not given.
        always_kept: those that a forward without a backward returns as well.
        output_saved_for: the argument whose gradient needs the output.
        overwritten: an activation that the output may be written over.
        other_form: a form of the op's own that takes a call instead of any backend, or None.
        flops: floating-point operations of a forward, from its arguments by name, tensors as their shapes.
        flops_backward: those of a backward.
        cases: the module of its parity cases, as ``fast_prompt.parity.prompt_diffusion`` is one.
        namespace: where it is registered, ``torch.ops.<namespace>``.
    """

    def __init__(
        self,
        api: Callable[..., Tensor],
        definition: Callable[..., Tensor],
        *,
        tensors: Sequence[Argument],
        options: Sequence[Option],
        check: Callable[..., None],
        sizes: Callable[..., Mapping[str, int]],
        results: Callable[..., list[Tensor]],
        kernels: Mapping[str, Kernels],
        flops: Callable[..., int],
        flops_backward: Callable[..., int],
        cases: str,
        kept: Sequence[str] = (),
        keep: Callable[..., Sequence[bool]] | None = None,
        always_kept: Sequence[str] = (),
        output_saved_for: str | None = None,
        overwritten: str | None = None,
        other_form: Callable[..., str | None] | None = None,
        namespace: str = "fast_prompt",
    ) -> None:
        name = api.__name__
        if name in OPS:
            raise ValueError(f"api: expected a name that no op has, got {name!r}")
        if overwritten and kept:
            raise ValueError(f"overwritten: expected None for an op that keeps {', '.join(kept)}, got {overwritten!r}")
        self.api, self.definition, self.name, self.namespace = api, definition, name, namespace
        self.kernels = dict(kernels)
        self.tensors = tuple(tensors)
        self.options = tuple(option for option in options if option.registered)
        self.planned: tuple[Argument | Option, ...] = (*(tensor for tensor in tensors if tensor.planned), *options)
        self.differentiable = tuple(tensor for tensor in tensors if tensor.role != "index")
        self.kept, self.keep = tuple(kept), keep
        self.keep_nothing = [each in always_kept for each in kept]
        self.check, self.sizes, self.results, self.other_form = check, sizes, results, other_form
        self.overwritten = overwritten
        places = {tensor.name: place for place, tensor in enumerate(tensors)}
        self.over = places[overwritten] if overwritten else -1
        self.output_saved_for = places[output_saved_for] if output_saved_for else -1
        self.flops, self.flops_backward, self.cases = flops, flops_backward, cases
        keep_flags = [Option("keep", "bool[]")] if kept else []
        results_saved = (("output",) if output_saved_for else ()) + self.kept
        self.forward_arguments: tuple[Argument | Option, ...] = (*self.tensors, *self.options, *keep_flags)
        self.backward_arguments: tuple[Argument | Option, ...] = (
            Argument("grad", "result"),
            *(tensor for tensor in self.tensors if tensor.is_saved),
            *(Argument(each, "result", optional=True) for each in results_saved),
            *self.options,
            Option("needs", "bool[]"),
        )
        self._plans: dict[object, Plan] = {}
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._registered: dict[tuple[str, str], Any] = {}  # by the backend's suffix and "", "_" or "_backward"
        for backend in self.kernels:
            self.define(backend)
        self.function = _autograd_function(self)
        self._choose = _choice(self)
        OPS[name] = self

    # ---- Registered ops ----

    def define(self, backend: str) -> None:
        """Registers the ops of a backend; those of the compiled library, with one name for CPU and CUDA, once."""
        suffix = BACKENDS[backend].suffix
        if (suffix, "") in self._registered:
            return
        forward, backward = f"{self.name}{suffix}", f"{self.name}_backward{suffix}"
        self._register(forward, self.forward_arguments, "Tensor[]", backend, self._fake)
        self._register(backward, self.backward_arguments, "Tensor[]", backend, self._fake_backward)
        names = {"": forward, "_backward": backward}
        if self.overwritten:
            names["_"] = f"{forward}_"
            self._register(names["_"], self.forward_arguments, "()", backend, lambda backend, **_: None)
        for kind, each in names.items():
            self._registered[suffix, kind] = getattr(getattr(torch.ops, self.namespace), each).default

    def _register(
        self, name: str, arguments: Sequence[Argument | Option], result: str, backend: str, fake: Callable[..., Any]
    ) -> None:
        schema = ", ".join(argument.schema for argument in arguments)
        if result == "()":
            schema = schema.replace(f"Tensor {self.overwritten}", f"Tensor(a!) {self.overwritten}")
        self._library.define(f"{name}({schema}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{self.namespace}::{name}"
        names = [argument.name for argument in arguments]
        # What runs Python gets the choices as strings; compiled code is called again as it was.
        compiled = BACKENDS[backend].compiled
        decoded = [None if compiled or isinstance(argument, Argument) else argument for argument in arguments]

        def run(*values: Any) -> Any:
            values = tuple(each.value(value) if each else value for each, value in zip(decoded, values, strict=True))
            return BACKENDS[backend].run(qualified, self.kernels[backend], *values)

        def run_fake(*values: Any) -> Any:
            return fake(backend, **dict(zip(names, values, strict=True)))

        self._library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, run_fake, lib=self._library)

    def registered(self, form: str, suffix: str) -> Any:
        """A backend's registered op: suffix ``""``, ``"_"`` or ``"_backward"``."""
        return self._registered[BACKENDS[form].suffix, suffix]

    def _fake(self, backend: str, **arguments: Any) -> list[Tensor]:
        return self.results(backend=backend, **arguments)

    def _fake_backward(self, backend: str, **arguments: Any) -> list[Tensor]:
        grad, needed = arguments["grad"], []
        for argument, needs in zip(self.differentiable, arguments["needs"], strict=True):
            if needs and argument.gradient_shape:
                needed.append(grad.new_empty(argument.gradient_shape(**arguments)))
            elif needs:
                needed.append(torch.empty_like(arguments[argument.name], memory_format=torch.contiguous_format))
        return needed

    # ---- Calls ----

    def plan(self, *arguments: Any) -> Plan:
        """Checks a call, once for all that are alike, and says how to run it.

        Args:
            arguments: the planned ones, in the declaration's order: tensors, then options.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            fast_prompt.BackendError: a backend was forced that cannot take the call.
        """
        if torch.compiler.is_compiling() or is_transformed(*arguments):
            return self._new_plan(arguments)
        try:
            kind: list[Any] = [forced(), autocast_dtype(arguments[0].device.type)]
            for value in arguments:
                if isinstance(value, Tensor):
                    kind += (value.shape, value.dtype, value.device, value.layout)
                else:
                    kind += (type(value), value)
            key = tuple(kind)
            plan = self._plans.get(key)
        except (TypeError, RuntimeError, AttributeError):  # what cannot be hashed; a nested tensor's shape; no tensor
            return self._new_plan(arguments)
        if plan is None:
            plan = self._new_plan(arguments)
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _new_plan(self, arguments: tuple[Any, ...]) -> Plan:
        named = {argument.name: value for argument, value in zip(self.planned, arguments, strict=True)}
        for argument in self.planned:
            self._check(argument, named[argument.name], arguments[0])
        self.check(*arguments)
        call = self.call(named)
        self._check_dtypes(named, call.dtype)
        form = self._form(named, call)
        # The definition takes numbers as they are: float64 keeps its own.
        scalars = torch.float32 if form in BACKENDS and form != "reference" else None
        wanted = {"activation": call.dtype, "scalars": scalars}
        casts = tuple(_cast(named.get(argument.name), wanted.get(argument.role)) for argument in self.tensors)
        options = {option.name: named[option.name] for option in self.options}
        keep = list(self.keep(**named)) if self.keep else [True] * len(self.kept)
        return Plan(self, call, form, casts, options, keep)

    def _form(self, named: dict[str, Any], call: Call) -> str:
        if any(0 in named[argument.name].shape for argument in self.tensors if not argument.optional):
            return "reference"
        form = self.other_form(call=call, **named) if self.other_form else None
        if form:
            return form
        names, values = tuple(call.sizes), tuple(call.sizes.values())
        return self._choose(forced(), call.device, call.dtype, call.weight_dtype, call.transformed, names, *values)

    def arguments_of(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The planned arguments, by name, of a call of the function that users call."""
        bound = inspect.signature(self.api).bind(*args, **kwargs)
        bound.apply_defaults()
        return {argument.name: bound.arguments[argument.name] for argument in self.planned}

    def call(self, named: dict[str, Any]) -> Call:
        """What the choice of a backend depends on, from the planned arguments by name."""
        first = named[self.tensors[0].name]
        weights = (named[tensor.name].dtype for tensor in self.tensors if tensor.role == "weight")
        transformed = is_transformed(*[named[tensor.name] for tensor in self.tensors if tensor.planned])
        dtype = activation_dtype(first)
        return Call(first.device, dtype, next(weights, dtype), self.sizes(**named), transformed)

    def _check(self, argument: Argument | Option, value: Any, leader: Tensor) -> None:
        """What an argument must be by itself, and where it must lie."""
        if isinstance(argument, Option):
            if argument.choices:
                checks.check_choice(argument.name, value, argument.choices)
            return
        if value is None and argument.optional:
            return
        (checks.check_dense if argument.role == "index" else checks.check_tensor)(argument.name, value)
        checks.check_device(argument.name, value, leader.device, f"that of {self.tensors[0].name}")

    def check_overwritten(self, tensors: Sequence[Tensor | None]) -> None:
        """Refuse, before anything is written, to write over what others would miss."""
        over = tensors[self.over]
        assert over is not None
        owner = over._base if over._is_view() else over
        if torch.is_grad_enabled() and owner is not None and owner.requires_grad and owner.is_leaf:
            raise ValueError(f"{self.overwritten}: expected a tensor to write over, got a leaf that trains")
        for argument, tensor in zip(self.tensors, tensors, strict=True):
            if tensor is None or argument.name == self.overwritten:
                continue
            if torch._C._is_alias_of(over, tensor):  # type: ignore[attr-defined]
                raise ValueError(f"{self.overwritten}: expected memory to write over, got that of {argument.name}")

    def _check_dtypes(self, named: dict[str, Any], dtype: torch.dtype) -> None:
        leader, weight = self.tensors[0].name, None
        for argument in self.tensors:
            value = named.get(argument.name)
            if value is None:
                continue
            if argument.role == "activation" and activation_dtype(value) != dtype:
                checks.check_dtype(argument.name, value, (dtype,), f"that of {leader}")
            elif argument.role == "weight" and weight is None:
                weight = argument
                allowed = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
                checks.check_dtype(argument.name, value, allowed, f"that of {leader}, or float32")
            elif argument.role == "weight":
                assert weight is not None
                checks.check_dtype(argument.name, value, (named[weight.name].dtype,), f"that of {weight.name}")


OPS: dict[str, Op] = {}


def _cast(value: Tensor | None, wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype to cast an argument to, or None to leave it as it is."""
    return None if value is None or value.dtype == wanted else wanted


def _choice(op: Op) -> Callable[..., str]:
    def chosen(
        forced: str | None,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        transformed: bool,
        names: tuple[str, ...],
        *sizes: int,
    ) -> str:
        return choose(op, Call(device, dtype, weight_dtype, dict(zip(names, sizes, strict=True)), transformed), forced)

    # What torch.compiler.assume_constant_result does, less its import of the whole compiler: the choice depends on
    # guarded constants alone.
    chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return chosen


def _autograd_function(op: Op) -> Any:
    """The op's ``torch.autograd.Function``, which ties the registered ops together."""
    saved_places = [place for place, tensor in enumerate(op.tensors) if tensor.is_saved]
    differentiable = [2 + place for place, tensor in enumerate(op.tensors) if tensor.role != "index"]

    def forward(ctx: Any, plan: Plan, overwrite: bool, *tensors: Any) -> Tensor:
        output, *found = plan.forward(overwrite, tensors, plan.keep)
        if overwrite and output is tensors[op.over]:
            ctx.mark_dirty(output)
        saved = [tensors[place] for place in saved_places]
        if op.output_saved_for >= 0:
            saved.append(output if ctx.needs_input_grad[2 + op.output_saved_for] else None)
        if op.kept:
            kept = iter(found)
            saved += [next(kept) if each else None for each in plan.keep]
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        return output

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_derivatives_of_backward(op.name, grad)
        asked = ctx.needs_input_grad
        needs = [asked[place] for place in differentiable]
        run = op.registered(ctx.plan.form, "_backward")
        gradients: Iterator[Tensor] = iter(run(grad, *ctx.saved_tensors, *ctx.plan.numbers, needs))
        return tuple([next(gradients) if need else None for need in asked])

    directions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op.name, (torch.autograd.Function,), directions)
