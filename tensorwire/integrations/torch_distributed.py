"""Training over torch.distributed with compressed messages in place of whole gradients.

    dist.init_process_group("gloo")
    optimizer = DeMo(model.parameters(), lr=1e-3)          # instead of AdamW; the model is not wrapped in DDP
    ...
    loss.backward()
    optimizer.step()                                       # all ranks, at the same step

Each rank compresses its gradients with a `tensorwire.updates.Compressor` and sends the message to all others. Each adds
up all messages in the order of ranks, so that weights stay equal to the bit, even on different processors. An error on
one rank is raised on all, so that no rank waits for it.

`DDPState` and `ddp_hook` use any compressor with DistributedDataParallel and the user's own optimizer. `DiLoCo` lets
ranks train alone for many steps with the user's own optimizer, and exchanges the changes.
"""

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import tensorwire
from tensorwire.checksum import crc32c
from tensorwire.errors import CorruptError, EncodeError, SchemaError, TensorwireError, TransportError
from tensorwire.updates import Compressor, Message, Method, Normalizer, combine, views

__all__ = ["DDPState", "DeMo", "DiLoCo", "Exchange", "ddp_hook"]

# Length of the message, or _FAILED; number of the step; what is exchanged; digest of the weights, or _NO_DIGEST.
_HEADER: Final = struct.Struct("<qqqq")
_FAILED: Final = -1
_NO_DIGEST: Final = -1
_REMEMBERED: Final = 16  # steps whose longest message the next one is expected not to exceed
_PIECE: Final = 1 << 20  # elements that are read at a time
_OURS: Final = "tensorwire"  # where a state dict of torch's has what is ours


class _Flight(NamedTuple):
    """An all-gather under way."""

    work: Any
    parts: list[torch.Tensor]

    def wait(self) -> list[bytes]:
        """What each rank gave. Raises TransportError."""
        try:
            if self.work is not None:
                self.work.wait()
        except RuntimeError as error:
            raise _connection(error) from error
        return [part.cpu().numpy().tobytes() for part in self.parts]


class Exchange:
    """An all-gather of messages of different lengths. All ranks of a group call it at the same steps.

    `group`: a process group (the default one). `contract`: text that must be equal on all ranks; checked before any
    message is used. Most steps take one collective, with room for the longest message of the last 16 steps; longer
    messages continue in a second one. `sent`: bytes that this rank has passed to collectives.
    """

    def __init__(self, group: Any = None, *, contract: str = "") -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("there is no process group: call torch.distributed.init_process_group first")
        self._group = group
        self._world = dist.get_world_size(group)
        self._contract = int.from_bytes(hashlib.blake2b(contract.encode(), digest_size=7).digest(), "little")
        on_cuda = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        self._longest = deque([0], maxlen=_REMEMBERED)
        self._data = b""
        self._flight: _Flight | None = None
        self.sent = 0

    @property
    def under_way(self) -> bool:
        """Whether `start` has been called, but not `finish`."""
        return self._flight is not None

    def start(self, message: bytes | None, *, step: int, digest: int = _NO_DIGEST) -> None:
        """Send a message without waiting for the others; None: this rank has none, because of an error.

        `digest`: of the weights, at least 0; all ranks must pass theirs at the same steps. Raises TransportError.
        """
        length = _FAILED if message is None else len(message)
        self._data = _HEADER.pack(length, step, self._contract, digest) + (message or b"")
        self._flight = self._gather(self._data, _HEADER.size + max(self._longest))

    def finish(self) -> list[bytes]:
        """The messages of all ranks, in their order.

        Raises on all ranks alike, and then delivers nothing: TransportError if a rank had no message or has gone,
        SchemaError if ranks are at different steps or have different contracts, CorruptError if their weights differ.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            raise RuntimeError("nothing was started")
        parts = flight.wait()
        lengths = self._checked([_HEADER.unpack_from(part) for part in parts])
        room, longest = len(parts[0]), _HEADER.size + max(lengths)
        if longest > room:
            rest = self._gather(self._data[room:], longest - room).wait()
            parts = [part + more for part, more in zip(parts, rest, strict=True)]
        self._longest.append(max(lengths))
        return [part[_HEADER.size : _HEADER.size + length] for part, length in zip(parts, lengths, strict=True)]

    def _gather(self, data: bytes, room: int) -> _Flight:
        padded = np.zeros(room, np.uint8)
        fits = min(len(data), room)
        padded[:fits] = np.frombuffer(data, np.uint8, fits)
        mine = torch.from_numpy(padded).to(self._device)
        parts = [torch.empty(room, dtype=torch.uint8, device=self._device) for _ in range(self._world)]
        self.sent += room
        try:
            return _Flight(dist.all_gather(parts, mine, group=self._group, async_op=True), parts)
        except RuntimeError as error:
            raise _connection(error) from error

    def _checked(self, headers: list[tuple[int, ...]]) -> list[int]:
        """The lengths of the messages. Raises as `finish`."""
        lengths, steps, contracts, digests = (list(column) for column in zip(*headers, strict=True))
        if _FAILED in lengths:
            failed = _ranks(lengths, _FAILED)
            raise TransportError(f"{failed} had nothing to send, and says why in an error of its own", retryable=False)
        if len({*contracts}) > 1:
            raise SchemaError(
                f"{_parted(contracts)} do not exchange the same: give all ranks the same model, spec and options"
            )
        if len({*steps}) > 1:
            at = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
            raise SchemaError(f"ranks are at different steps ({at}): load the same checkpoint in all of them")
        if len({*digests}) > 1:
            raise CorruptError(
                f"the weights of {_parted(digests)} differ before step {steps[0]}: start all ranks with the same ones "
                "(seed them alike, load one checkpoint, or broadcast those of one rank)"
            )
        return lengths


class DeMo(torch.optim.Optimizer):
    """Decoupled momentum: an optimizer whose ranks exchange a thousandth of their gradients' bytes.

    Each rank keeps the momentum of its own gradients, sends its largest DCT coefficients and subtracts them. All ranks
    move by `lr` along the sign of the mean of the messages (Peng, Quesnelle, Kingma, arXiv:2411.19870).

    `params`: as for other optimizers, in float32, float16 or bfloat16; errors use their names, if given. `lr`: about as
    for AdamW. `spec`: a method of `tensorwire.updates` ("demo:k=4", "demo:k=40"). `beta2`: each
    rank first divides its gradients by their root mean square, as Adam does, with this decay per step (0.99), so that
    tensors with small gradients are sent as often as others. `weight_decay`: as for AdamW. `group`: a process group,
    the default one if None. `check_every`: the ranks compare their weights before the first step and then every so
    many steps; 0: never. `overlap`: messages are sent during the next step and applied one step late; call `flush`
    after the last one.

    `step` raises as `Exchange.finish`, and NonFiniteError for gradients that are not finite, on all ranks. The weights
    are then unchanged, and unsent momentum is kept for the next step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        spec: str | Method = "demo:k=32",
        beta2: float | None = None,
        weight_decay: float = 0.0,
        group: Any = None,
        check_every: int = 100,
        overlap: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("check_every", check_every)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, not {value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._compressor = Compressor(spec)
        self._beta2 = beta2
        self._normalizer = None if beta2 is None else Normalizer(beta2)
        self._check_every = check_every
        self._overlap = overlap
        described = [(name, str(p.dtype), tuple(p.shape)) for name, p, _ in self._trained()]
        if len({name for name, _, _ in described}) < len(described):
            raise ValueError("two parameters have the same name")
        contract = f"{self._compressor.method} {beta2} {check_every} {overlap} {described}"
        self._exchange = Exchange(group, contract=contract)
        self._step = 0
        self._message = Message(b"", settled=True)
        self._arrived: list[bytes] = []  # messages of all ranks that do not count yet

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far to each of the others."""
        return self._exchange.sent

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Add the gradients, exchange messages and move the weights. Every rank of the group must call it.

        A parameter without a gradient counts as one with zeros. Gradients are not written to.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        try:
            self._send()
        except Exception:
            self._move()  # as the others do, with what came of the step before
            raise
        if not self._overlap:
            self._collect()
        self._move()
        return loss

    def flush(self) -> None:
        """With `overlap`, apply the last message. Every rank of the group must call it after its last step."""
        self._collect()
        with torch.no_grad():
            self._move()

    def state_dict(self) -> dict[str, Any]:
        """The state, as of other optimizers; each rank must save its own. With `overlap`, every rank must call it.

        It holds tensors, plain values and their containers, for `torch.save` or `tensorwire.torch.save_file`.
        """
        self._collect()
        normalizer = None if self._normalizer is None else self._normalizer.state_dict()
        compressor = self._compressor.state_dict()
        ours = {"step": self._step, "compressor": compressor, "normalizer": normalizer, "arrived": self._arrived}
        return {**super().state_dict(), _OURS: _tensors(ours)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`. Raises SchemaError for the state of another optimizer or method."""
        theirs = dict(state_dict)
        ours = theirs.pop(_OURS, None)
        if ours is None:
            raise SchemaError("this is the state of another optimizer than DeMo")
        ours = _arrays(ours)
        if (self._beta2 is None) != (ours["normalizer"] is None):
            raise SchemaError("only one of this optimizer and the saved one has a beta2")
        compressor = _loaded(self._compressor, ours["compressor"])
        normalizer = None
        if self._beta2 is not None:
            normalizer = Normalizer(self._beta2)
            normalizer.load_state_dict(ours["normalizer"])
        super().load_state_dict(theirs)
        self._compressor, self._normalizer = compressor, normalizer
        self._step = ours["step"]
        self._arrived = [message.tobytes() for message in ours["arrived"]]

    def _trained(self) -> Iterable[tuple[str, torch.Tensor, dict[str, Any]]]:
        """(name, parameter, its group) of all that are trained."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{number}.{place}" for place in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.requires_grad:
                    yield name, parameter, group

    def _sent_together(self) -> dict[str, list[tuple[torch.Tensor, dict[str, Any]]]]:
        """By name, the parameters that travel as one tensor: all vectors of a dtype, and each matrix by itself.

        Most of a model's tensors are vectors, which are few of its bytes and would cost a header each.
        """
        together: dict[str, list[tuple[torch.Tensor, dict[str, Any]]]] = {}
        for name, parameter, group in self._trained():
            key = name if parameter.dim() > 1 else f"vectors of {parameter.dtype}"
            together.setdefault(key, []).append((parameter, group))
        return together

    def _send(self) -> None:
        digest = _NO_DIGEST
        try:
            gradients = {name: _gradient([p for p, _ in each]) for name, each in self._sent_together().items()}
            if self._normalizer is None:
                message = self._compressor.compress(gradients)
            else:
                floats = {name: gradient.detach().float().cpu().numpy() for name, gradient in gradients.items()}
                message = self._compressor.compress(self._normalizer.divide(floats))
            if self._check_every and self._step % self._check_every == 0:
                digest = _digest({name: p.detach() for name, p, _ in self._trained()})
        except Exception:
            _tell_others(self._exchange, self._step)
            raise
        self._message = message
        try:
            self._exchange.start(message.data, step=self._step, digest=digest)
        except TensorwireError:
            self._compressor.nack(message)
            raise

    def _collect(self) -> None:
        """Wait for the messages that are under way, if any."""
        if not self._exchange.under_way:
            return
        try:
            self._arrived = self._exchange.finish()
        except BaseException:
            self._compressor.nack(self._message)
            raise
        self._compressor.ack(self._message)
        self._step += 1

    def _move(self) -> None:
        """Move the weights as the messages say that have arrived."""
        if not self._arrived:
            return
        changes = combine(self._arrived, how="present")
        self._arrived = []
        for name, together in self._sent_together().items():
            directions = torch.from_numpy(changes[name]).sign_().reshape(-1)
            parts = directions.split_with_sizes([parameter.numel() for parameter, _ in together])
            for (parameter, group), direction in zip(together, parts, strict=True):
                # One rounding each, whether or not a processor multiplies and adds at once: a sign times lr is exact.
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.view(parameter.shape).to(parameter.device), alpha=-group["lr"])


class DiLoCo:
    """Outer steps: ranks train alone for `every` steps, then all continue from the same weights.

    The mean change of the ranks' weights is the negative gradient of an outer step, SGD with Nesterov momentum
    (Douillard et al., arXiv:2311.08105). The inner optimizer is the user's, and its state stays on its rank.

    `params`: in float32, float16 or bfloat16, with or without names. `spec`: a method of `tensorwire.updates`, which
    sends later what it leaves out, or a codec, which does not ("nf4", "raw"); with "topk:k=64,beta=0.95" and momentum 0
    this is SparseLoCo (arXiv:2508.15706). `rate`: learning rate of the outer steps.

        outer = DiLoCo(model.named_parameters(), spec="topk:k=64", every=30)
        ...
        inner.step()
        outer.step()                                       # after each step of the inner optimizer
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        spec: str = "topk:k=64",
        every: int = 30,
        rate: float = 0.7,
        momentum: float = 0.9,
        group: Any = None,
    ) -> None:
        if every < 1 or not 0 < rate < float("inf") or not 0 <= momentum < 1:
            raise ValueError("every must be at least 1, rate above 0 and finite, momentum at least 0 and less than 1")
        named = [each if isinstance(each, tuple) else (str(place), each) for place, each in enumerate(params)]
        self._weights = {name: parameter.detach() for name, parameter in named if parameter.requires_grad}
        # Where the last outer step left the weights, and its momentum.
        self._base = {name: weight.float().cpu().clone() for name, weight in self._weights.items()}
        self._velocity = {name: torch.zeros_like(base) for name, base in self._base.items()}
        self._compressor, self._codec = _sender(spec)
        self._every, self._rate, self._momentum = every, rate, momentum
        described = [(name, str(w.dtype), tuple(w.shape)) for name, w in self._weights.items()]
        self._exchange = Exchange(group, contract=f"{spec} {every} {rate} {momentum} {described}")
        self._steps = 0

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far to each of the others."""
        return self._exchange.sent

    def step(self) -> None:
        """Count a step of the inner optimizer; after `every` of them, make an outer step. Every rank must call it.

        Raises as `Exchange.finish`, and NonFiniteError for weights that are not finite, on all ranks. The weights are
        then those after the last outer step; what a method has taken in is kept for the next one.
        """
        if (self._steps + 1) % self._every == 0:
            with torch.no_grad():
                self._outer_step()
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank, in tensors, without its weights and its inner optimizer."""
        kept = None if self._compressor is None else self._compressor.state_dict()
        made: dict[str, Any] = _tensors(
            {"steps": self._steps, "base": self._base, "velocity": self._velocity, "compressor": kept}
        )
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`. Raises SchemaError for the state of another model or method."""
        if {name: base.shape for name, base in state_dict["base"].items()} != _shapes(self._base):
            raise SchemaError("this is the state of another model")
        state = _arrays(state_dict)
        if self._compressor is not None:
            self._compressor = _loaded(self._compressor, state["compressor"])
        self._base = {name: torch.from_numpy(base.copy()) for name, base in state["base"].items()}
        self._velocity = {name: torch.from_numpy(velocity.copy()) for name, velocity in state["velocity"].items()}
        self._steps = state["steps"]

    def _outer_step(self) -> None:
        message: Message | None = None
        try:
            change = {name: base - self._weights[name].cpu() for name, base in self._base.items()}
            if self._compressor is None:
                data = tensorwire.dumps(change, codec=self._codec)
            else:
                message = self._compressor.compress(change)
                data = message.data
            digest = _digest(self._base)
        except Exception:
            _tell_others(self._exchange, self._steps)
            raise
        try:
            self._exchange.start(data, step=self._steps, digest=digest)
            mean = combine(self._exchange.finish())
        except BaseException:
            if self._compressor is not None:
                self._compressor.nack(message)
                self._put_back()
            raise
        if self._compressor is not None:
            self._compressor.ack(message)
        for name, base in self._base.items():
            gradient, velocity = torch.from_numpy(mean[name]), self._velocity[name]
            # Products and sums one after the other, each rounded: on all processors alike.
            velocity.mul_(self._momentum).add_(gradient)
            base.sub_(gradient.add(velocity.mul(self._momentum)).mul_(self._rate))
        self._put_back()

    def _put_back(self) -> None:
        for name, base in self._base.items():
            self._weights[name].copy_(base)


class DDPState:
    """The state of `ddp_hook` for a model: what each rank has not sent yet.

    `model`: the one that DistributedDataParallel wraps, or the wrapper. `spec`: a method of `tensorwire.updates`,
    normally with error feedback ("topk:k=64", "lowrank:rank=4"). `group`: the wrapper's process group.

        model = DistributedDataParallel(model)
        model.register_comm_hook(DDPState(model, "topk:k=64"), ddp_hook)
    """

    def __init__(self, model: torch.nn.Module, spec: str | Method, *, group: Any = None) -> None:
        self.compressor = Compressor(spec)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._group = group
        self._exchanges: dict[tuple[str, ...], Exchange] = {}
        self._steps = 0

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far to each of the others."""
        return sum(exchange.sent for exchange in self._exchanges.values())

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank, in tensors; each rank must save its own."""
        made: dict[str, Any] = _tensors({"steps": self._steps, "compressor": self.compressor.state_dict()})
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`. Raises SchemaError for the state of another method."""
        state = _arrays(state_dict)
        self.compressor = _loaded(self.compressor, state["compressor"])
        self._steps = state["steps"]

    def exchange(self, bucket: Any) -> Any:
        """The mean of what all ranks send of a bucket, written over its gradients."""
        # DDP sorts its buckets anew after the first step: a gradient goes by the name of its parameter.
        names = tuple(self._names[id(parameter)] for parameter in bucket.parameters())
        gradients = dict(zip(names, bucket.gradients(), strict=True))
        exchange = self._exchanges.get(names)
        if exchange is None:
            exchange = Exchange(self._group, contract=f"{self.compressor.method} {names}")
            self._exchanges[names] = exchange
        try:
            message = self.compressor.compress(gradients)
        except Exception:
            _tell_others(exchange, self._steps)
            raise
        try:
            exchange.start(message.data, step=self._steps)
            means = combine(exchange.finish())
        except BaseException:
            self.compressor.nack(message)
            raise
        self.compressor.ack(message)
        for name, gradient in gradients.items():
            gradient.copy_(torch.from_numpy(means[name]))
        self._steps += bucket.is_last()
        return bucket.buffer()


# DDP looks at the annotations, and its stubs lack the class.
def ddp_hook(state: DDPState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """A communication hook of DistributedDataParallel that sends gradients compressed by `state`'s compressor.

    A bucket is exchanged when it is complete, before the next one. Raises as `Exchange.finish`, from `backward`; what
    was to be sent is then kept.
    """
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    with torch.no_grad():
        done.set_result(state.exchange(bucket))
    return done


def _sender(spec: str) -> tuple[Compressor | None, str]:
    """The compressor that a spec names, or the codec if it names none. Raises EncodeError."""
    try:
        return Compressor(spec), ""
    except EncodeError as error:
        try:
            tensorwire.codec(spec)
        except EncodeError:
            raise error from None
        return None, spec


def _loaded(like: Compressor, state: Any) -> Compressor:
    """A compressor as another one, in a state that was saved. Raises SchemaError for one of another method."""
    compressor = Compressor(like.method)
    try:
        compressor.load_state_dict(state)
    except EncodeError as error:
        raise SchemaError(error.detail) from error
    return compressor


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _gradient(parameters: list[torch.Tensor]) -> torch.Tensor:
    """The gradients of parameters, several of them one behind the other."""
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    return found[0] if found[0].dim() > 1 else torch.cat([each.detach().reshape(-1).cpu() for each in found])


def _digest(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32C of all elements."""
    crc = 0
    for view in views(tensors).values():
        for start in range(0, view.numel, _PIECE):
            crc = crc32c(view.read(start, min(start + _PIECE, view.numel)), crc)
    return crc


def _tell_others(exchange: Exchange, step: int) -> None:
    """That this rank has no message. The error that is the reason for it is the one to be raised."""
    try:
        exchange.start(None, step=step)
        exchange.finish()
    except TensorwireError:
        pass


def _ranks(values: Sequence[int], value: int) -> str:
    found = [str(rank) for rank, each in enumerate(values) if each == value]
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(found)}"


def _parted(values: Sequence[int]) -> str:
    """The ranks, those together that have the same value."""
    return " and ".join(_ranks(values, value) for value in dict.fromkeys(values))


def _connection(error: RuntimeError) -> TransportError:
    said = str(error).strip().partition("\n")[0]
    return TransportError(f"the process group failed ({said}): start all ranks again from their checkpoints")


def _tensors(value: Any) -> Any:
    """The same with tensors for arrays, over the same memory where it can be written to."""
    if isinstance(value, dict):
        return {key: _tensors(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_tensors(each) for each in value]
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value


def _arrays(value: Any) -> Any:
    """The same with arrays for tensors."""
    if isinstance(value, Mapping):
        return {key: _arrays(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_arrays(each) for each in value]
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
