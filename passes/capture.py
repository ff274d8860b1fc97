"""Retrace Dynamo's graph, or an exported one, to pre-dispatch ATen: one dialect, still differentiable.

`scaled_dot_product_attention`, `linear` and `dropout` stay single nodes; shapes and dtypes are in `node.meta["val"]`;
`nn_module_stack` survives and becomes `Region.path`. Bodies of higher-order operators (checkpointing) are captured on
their own and the operator is kept, so that recomputation survives. Autocast, inside the graph or around it, becomes
explicit casts, because only then are the dtypes in the metadata those of the run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnc.errors import CaptureError
from attnc.passes import vmap
from attnc.passes.expand import EXPANSIONS

log = logging.getLogger("attnc.passes.capture")

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
# Dynamo's brackets around x.requires_grad_(): a permission that only torch.func's own levels ask for.
_ALLOW_REQUIRES_GRAD = torch._C._functorch.set_inplace_requires_grad_allowed


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """`gm` as pre-dispatch ATen, with fake tensors of Dynamo's own mode as metadata.

    Raises: CaptureError naming the node that could not be retraced.
    """
    batched = vmap.PARTS if vmap.spans(gm.graph) else ()
    transform = next((n for n in gm.graph.nodes if _transforms(n) and n.target not in batched), None)
    if transform is not None:
        name = transform.target.__name__.strip("_").removesuffix("_increment_nesting")
        raise CaptureError(
            f"retrace the graph to ATen: found the torch.func transform {name} at node "
            f"{transform.name}, which cannot be retraced. The graph goes to the inner backend as written; build masks "
            "outside of vmap, or compile the function inside the transform, to have it rewritten."
        )
    fake_mode = _fake_mode(gm, example_inputs)
    fakes = _fake_inputs(gm, example_inputs, fake_mode)
    return _trace(gm, fakes, fake_mode)


def _transforms(node: fx.Node) -> bool:
    return "functorch" in str(getattr(node.target, "__module__", "")) and node.target is not _ALLOW_REQUIRES_GRAD


def _trace(gm: fx.GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode) -> fx.GraphModule:
    retracer = _Retracer(gm, fake_mode)
    try:
        with fake_mode, preserve_node_meta(), ambient_autocast_off(retracer.device):
            traced = make_fx(retracer.run_flat, pre_dispatch=True)(*fakes)
    except Exception as exc:  # whatever tracing raises, the graph is left as it was and the reason is said
        node = retracer.current
        raise CaptureError(
            f"retrace the graph to ATen: {type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''} at node "
            f"{node.format_node() if node is not None else '(none)'}. The graph goes to the inner backend as written; "
            "move the operation out of the compiled region to have the rest rewritten."
        ) from exc
    for node, original, fake in zip(_placeholders(traced), _placeholders(gm), fakes, strict=True):
        node.meta["requires_grad"] = isinstance(fake, torch.Tensor) and fake.requires_grad
        node.meta.setdefault("val", original.meta.get("example_value"))
        node.meta["name"] = original.name
    return traced


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _fake_mode(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    found = detect_fake_mode([*example_inputs, *(n.meta.get("val") for n in _placeholders(gm))])
    return found if found is not None else FakeTensorMode(allow_non_fake_inputs=True)


def _fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Inputs as fake tensors that share Dynamo's shape symbols."""
    context = TracingContext.try_get()
    contexts = context.tensor_to_context if context is not None else {}
    fakes = []
    for node, value in zip(_placeholders(gm), example_inputs, strict=True):
        known = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(value, torch.Tensor):
            fakes.append(known if known is not None else value)
            continue
        own = next((x for x in (value, known) if isinstance(x, FakeTensor) and x.fake_mode is mode), None)
        fakes.append(_alias(_fake(value, mode, contexts.get(value)) if own is None else own))
    return fakes


def _fake(value: torch.Tensor, mode: FakeTensorMode, symbolic: Any) -> FakeTensor:
    """As AOTAutograd will make it: without the source, lengths become new symbols that no guard can name."""
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source)


def _alias(fake: torch.Tensor) -> torch.Tensor:
    """Another handle for `fake`: what the graph writes must not change what AOTAutograd finds in the mode's memo."""
    if isinstance(fake, torch.nn.Parameter):
        return fake
    return fake.detach().requires_grad_(fake.requires_grad)


def device_of(inputs: Sequence[Any]) -> str:
    """The device type of a graph's first tensor input."""
    return next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")


def ambient_autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast: a captured graph holds its casts itself."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else contextlib.nullcontext()


def _autocasts(device_type: str) -> bool:
    """Whether autocast is on; a type of device that has none, as meta, cannot be asked."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _CastProbe(TorchDispatchMode):
    """Which arguments the dispatcher casts before it runs an operator under autocast, and to which dtype."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._known = {id(t): index for index, t in enumerate(tensors)}
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is torch.ops.aten._to_copy.default
            and id(args[0]) in self._known
            and kwargs.get("dtype") is not None
        ):
            self.casts.setdefault(self._known[id(args[0])], kwargs["dtype"])
        return func(*args, **kwargs)


class _Retracer(fx.Interpreter):
    """Runs a graph under make_fx; keeps higher-order operators, expands autocast, remembers where it is."""

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fake_mode = fake_mode
        self.current: fx.Node | None = None
        self.batched = {node: span for span in vmap.spans(gm.graph) for node in span.nodes}
        self.written_out: dict[fx.Node, Any] = {}
        self.autocast: list[Any] = []
        self.device = next((t.device.type for t in _tensors(gm)), "cpu")
        if _autocasts(self.device):
            self.autocast.append((self.device, torch.get_autocast_dtype(self.device), True, False))

    def run_flat(self, *args: Any) -> Any:
        return self.run(*args, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        span = self.batched.get(n)
        if span is not None:
            if n is span.nodes[0]:
                if self.autocast and self.autocast[-1][2]:
                    raise NotImplementedError("torch.vmap under autocast")
                self.written_out |= span.expand([self.env[x] for x in span.inputs])
            return self.written_out.get(n)
        value = n.meta.get("example_value")
        if n.op == "call_method" and n.target == "item" and isinstance(value, (torch.SymFloat, torch.SymInt)):
            return self._item(n, value)
        return super().run_node(n)

    def _item(self, n: fx.Node, value: torch.SymFloat | torch.SymInt) -> Any:
        """A Python number that Dynamo passed as a tensor: keep Dynamo's symbol for it."""
        (tensor,), _ = self.fetch_args_kwargs_from_env(n)
        mode = get_proxy_mode()
        assert mode is not None
        out = mode.tracer.create_proxy(
            "call_function", torch.ops.aten._local_scalar_dense.default, (_proxy(mode.tracer, tensor),), {}
        )
        return track_tensor_tree(value, out, constant=None, tracer=mode.tracer)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is _ENTER:
            setting = (
                *args,
                *(kwargs.get(k) for k in ("device_type", "dtype", "enabled", "cache_enabled")[len(args) :]),
            )
            self.autocast.append(setting)
            return setting
        if target is _EXIT:
            self.autocast.remove(args[0])
            return None
        if target is _ALLOW_REQUIRES_GRAD:
            return None
        if isinstance(target, HigherOrderOperator):
            return self._keep(target, args, kwargs)
        target = EXPANSIONS.get(target, target)
        with self._autocast_casts(target, args, kwargs) as (args, kwargs):
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        function = getattr(torch.Tensor, target, None)
        if function is None:
            return super().call_method(target, args, kwargs)
        with self._autocast_casts(function, args, kwargs) as (args, kwargs):
            return super().call_method(target, args, kwargs)

    @contextlib.contextmanager
    def _autocast_casts(self, function: Any, args: tuple, kwargs: dict):
        """Arguments with the casts that autocast would insert; the dispatcher itself is asked which."""
        setting = self.autocast[-1] if self.autocast else None
        if setting is None or not setting[2] or isinstance(function, HigherOrderOperator):
            yield args, kwargs
            return
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        casts = self._probe(function, setting, flat, spec, tensors) if tensors else {}
        index = 0
        for position, x in enumerate(flat):
            if isinstance(x, torch.Tensor):
                if index in casts and x.dtype != casts[index]:
                    flat[position] = x.to(casts[index])
                index += 1
        yield pytree.tree_unflatten(flat, spec)

    def _probe(self, function, setting, flat, spec, tensors) -> dict[int, torch.dtype]:
        device_type, dtype, _, _ = setting
        # Without torch functions too: pre-dispatch tracing records switches of grad mode and autocast through them.
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), torch.no_grad():
            twins = {id(t): torch.empty_like(t) for t in tensors}
            args, kwargs = pytree.tree_unflatten([twins.get(id(x), x) for x in flat], spec)
            probe = _CastProbe([twins[id(t)] for t in tensors])
            with torch.autocast(device_type, dtype=dtype, cache_enabled=False), probe:
                function(*args, **kwargs)
        return probe.casts

    def _keep(self, target: HigherOrderOperator, args: tuple, kwargs: dict) -> Any:
        """A higher-order operator as one node; graph bodies are captured on their own."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        with disable_proxy_modes_tracing():
            args, kwargs = self._bodies(target, args, kwargs)
            out = self._outputs(target, args, kwargs)
        proxy_args, proxy_kwargs = pytree.tree_map(lambda x: _proxy(tracer, x), (args, kwargs))
        proxy = tracer.create_proxy("call_function", target, proxy_args, proxy_kwargs)
        return track_tensor_tree(out, proxy, constant=None, tracer=tracer)

    def _bodies(self, target: HigherOrderOperator, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if target is not tag_activation_checkpoint:
            return args, kwargs
        body, *operands = args
        return (_trace(body, operands, self.fake_mode), *operands), kwargs

    def _outputs(self, target: HigherOrderOperator, args: tuple, kwargs: dict) -> Any:
        if target is tag_activation_checkpoint:
            return fx.Interpreter(args[0]).run(*args[1:])
        assert self.current is not None
        known = self.current.meta.get("example_value")
        return pytree.tree_map_only(
            FakeTensor, lambda t: t if t.fake_mode is self.fake_mode else self.fake_mode.from_tensor(t), known
        )


def _tensors(gm: fx.GraphModule) -> list[torch.Tensor]:
    values = (n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _proxy(tracer: Any, x: Any) -> Any:
    if isinstance(x, fx.GraphModule):
        name = f"body_{sum(1 for k in tracer.root._modules if k.startswith('body_'))}"
        setattr(tracer.root, name, x)
        return tracer.create_proxy("get_attr", name, (), {})
    if isinstance(x, torch.Tensor):
        return tracer.unwrap_proxy(x) if hasattr(tracer, "unwrap_proxy") else x
    return tracer.unwrap_proxy(x) if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x


def is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload)
