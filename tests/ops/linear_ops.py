"""Questions that are put to every adapted linear layer's op."""

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from lorakern import backend
from lorakern.testing import lost_share


def name(value):
    return str(value).removeprefix("torch.").replace(" ", "")


def detached(args):
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)


def check_compiles_once(function, op, args, scale_at):
    """One opaque op a direction in a full graph, and a new scale enters no other."""
    found = {"forward": [], "backward": []}

    def note(direction):
        def compile(graph_module, _):
            nodes = (str(n.target) for n in graph_module.graph.nodes)
            found[direction] += [n for n in nodes if "lorakern" in n]
            return make_boxed_func(graph_module)

        return compile

    counter = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    before, after = args[:scale_at], args[scale_at + 1 :]
    for scale in (0.5, 2.0, -1.0):
        y = compiled(*before, torch.tensor(scale, dtype=torch.float64), *after)
        y.sum().backward()
        torch.testing.assert_close(y, function(*before, scale, *after))
    assert found["forward"] == [f"lorakern.{op}_fwd.default"]
    assert found["backward"] == [f"lorakern.{op}_bwd.default"]


def check_needs(function, args, trained):
    """Each of the trained arguments alone gets the gradient that it gets with the others."""
    want = torch.autograd.grad(function(*args).sum(), [args[at] for at in trained])
    for only, grad in zip(trained, want, strict=True):
        mine = list(detached(args))
        mine[only].requires_grad_()
        function(*mine).sum().backward()
        for at in trained:
            assert (mine[at].grad is not None) == (at == only)
        torch.testing.assert_close(mine[only].grad, grad)


def check_saves_only_inputs(function, args):
    known = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
    new = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            new.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*args)
    assert new == []
    y.sum().backward()


def lost_shares(op, args, delta):
    """Kernel -> share of the update's effect that it loses, of y and of dx.

    Args:
        args: of the forward, without bias or gain: x, weight, None, *factors, scale, None.
        delta: the exact update, [O, I] in float64.
    """
    x, weight, _, *factors, scale, _ = args
    lost = {}
    forward, backward = (backend.OPS[f"{op}_{d}"] for d in ("fwd", "bwd"))
    dy = torch.randn(*x.shape[:-1], weight.shape[0], dtype=torch.float64).to(x)
    ways = [(forward, x, weight.mT, delta.mT, args)]
    needs = [True] + [False] * (len(factors) + 1)
    ways.append((backward, dy, weight, delta, (dy, x, weight, *factors, scale, None, needs)))
    for way, a, base, update, given in ways:
        for kernel, reason in backend.why(way, *given).items():
            if reason == "ok":
                run = way.load(kernel)

                def first(run=run, given=given):
                    out = run(*given)
                    return out[0] if isinstance(out, tuple) else out

                share = lost_share(first, a.double() @ update, a.double() @ base.double())
                lost[f"{way.name} on {kernel}"] = share
    return lost
