"""DeMo and the hook of DDP between processes over gloo: weights are equal on all ranks, and all say what breaks."""

import multiprocessing
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

import tensorwire
from tensorwire.errors import CorruptError, NonFiniteError, SchemaError, TensorwireError, TransportError
from tensorwire.integrations.torch_distributed import DDPState, DeMo, DiLoCo, ddp_hook
from tensorwire.updates import message_size

SPAWN = multiprocessing.get_context("spawn")


def ranks(work: Callable[..., Any], folder: Path, world: int, *arguments: Any, isa: tuple[str, ...] = ()) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of so many processes of a group; None for one that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        before = os.environ.get("TENSORWIRE_ISA")
        if rank < len(isa):
            os.environ["TENSORWIRE_ISA"] = isa[rank]
        processes.append(SPAWN.Process(target=_work, args=(work, folder, rank, world, arguments)))
        processes[-1].start()
        os.environ.pop("TENSORWIRE_ISA", None)
        if before is not None:
            os.environ["TENSORWIRE_ISA"] = before
    for process in processes:
        process.join(300)
    results = [folder / f"{rank}.result" for rank in range(world)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]


def _work(work: Callable[..., Any], folder: Path, rank: int, world: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = work(rank, *arguments)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(20, 70), torch.nn.GELU(), torch.nn.LayerNorm(70), torch.nn.Linear(70, 4))


def loss(trained: Any, rank: int, step: int) -> Any:
    """The loss on data of this rank's own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    given = torch.randn(8, 20, generator=generator)
    return torch.nn.functional.cross_entropy(trained(given), given[:, rank : rank + 4].argmax(1))


def train(optimizer: Any, trained: Any, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(trained, rank, step).backward()
        optimizer.step()


def weights(trained: Any) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in trained.parameters())


def said(call: Callable[[], Any]) -> Any:
    """The error of a call, as one can tell it."""
    try:
        call()
    except TensorwireError as error:
        return type(error), str(error)
    return None


# ---- what two ranks do in one go ------------------------------------------------------------------------------


def _scenarios(rank: int, folder: Path) -> dict[str, Any]:
    return {name[1:]: scenario(rank, folder) for name, scenario in SCENARIOS.items()}


def _equal(rank: int, folder: Path) -> Any:
    trained = model()
    before = weights(trained)
    optimizer = DeMo(trained.named_parameters(), lr=1e-2, spec="demo:k=8", weight_decay=0.1, check_every=3)
    train(optimizer, trained, rank, range(8))
    return weights(trained), weights(trained) != before, optimizer.sent


def _late(rank: int, folder: Path) -> Any:
    """With overlap, the first message counts in the second step, and the last one when flushed."""
    trained = model()
    before = weights(trained)
    optimizer = DeMo(trained.parameters(), lr=1e-2, spec="demo:k=8", overlap=True)
    train(optimizer, trained, rank, range(1))
    unmoved = weights(trained) == before
    optimizer.flush()
    return unmoved, weights(trained), weights(trained) != before


def _restarted(rank: int, folder: Path) -> Any:
    """Saved and loaded by torch, and by this library, with a message under way."""
    ends = []
    options = {"lr": 1e-2, "spec": "lowrank:rank=2,beta=0.9", "beta2": 0.9, "overlap": True}
    for way in ("through", "torch", "tensorwire"):
        trained = model()
        optimizer = DeMo(trained.parameters(), **options)
        train(optimizer, trained, rank, range(3))
        if way != "through":
            path = folder / f"{way}-{rank}"
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
            if way == "torch":
                torch.save(state, path)
                state = torch.load(path, weights_only=True)
            else:
                tensorwire.torch.save_file(state, path)
                state = tensorwire.torch.load_file(path)
            trained = model(7)
            trained.load_state_dict(state["model"])
            optimizer = DeMo(trained.parameters(), **options)
            optimizer.load_state_dict(state["optimizer"])
        train(optimizer, trained, rank, range(3, 6))
        optimizer.flush()
        ends.append(weights(trained))
    return ends


def _drifted(rank: int, folder: Path) -> Any:
    trained = model(seed=rank)
    optimizer = DeMo(trained.parameters())
    before = weights(trained)
    return said(lambda: train(optimizer, trained, rank, range(1))), weights(trained) == before


def _unlike(rank: int, folder: Path) -> Any:
    trained = model()
    optimizer = DeMo(trained.parameters(), spec=f"demo:k={4 + rank}")
    return said(lambda: train(optimizer, trained, rank, range(1)))


def _astray(rank: int, folder: Path) -> Any:
    """One rank goes on from a checkpoint, the other does not."""
    trained = model()
    optimizer = DeMo(trained.parameters(), check_every=0)
    train(optimizer, trained, rank, range(2))
    state, optimizer = optimizer.state_dict(), DeMo(trained.parameters(), check_every=0)
    if rank == 1:
        optimizer.load_state_dict(state)
    return said(lambda: train(optimizer, trained, rank, range(1)))


def _failing(rank: int, folder: Path) -> Any:
    """A rank has no finite gradients: all raise, nothing moves, and the next step is as if it had not been."""
    trained = model()
    optimizer = DeMo(trained.named_parameters(), spec="demo:k=8")
    before = weights(trained)
    loss(trained, rank, 0).backward()
    if rank == 1:
        trained[0].weight.grad[0, 0] = float("nan")
    error = said(optimizer.step)
    unmoved = weights(trained) == before
    train(optimizer, trained, rank, range(2))
    return error, unmoved, weights(trained)


def _late_failing(rank: int, folder: Path) -> Any:
    """As before with a message under way, which counts on all ranks; the others hear of the error a step later."""
    trained = model()
    optimizer = DeMo(trained.named_parameters(), spec="demo:k=8", check_every=1, overlap=True)
    train(optimizer, trained, rank, range(1))
    if rank == 1:
        trained[0].weight.grad[0, 0] = float("nan")
    errors = [said(optimizer.step)]
    if rank == 0:
        errors.append(said(optimizer.step))
    moved = weights(trained)
    train(optimizer, trained, rank, range(1, 3))
    optimizer.flush()
    return errors, moved, weights(trained)


def _hooked(rank: int, folder: Path) -> Any:
    """Under DDP, in several buckets, and from a state that was saved."""
    ends = []
    for saved in (False, True):
        trained = model()
        wrapped = torch.nn.parallel.DistributedDataParallel(trained, bucket_cap_mb=0.004)
        state = DDPState(trained, "topk:k=64,values=4bit")
        wrapped.register_comm_hook(state, ddp_hook)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        train(optimizer, wrapped, rank, range(3))
        if saved:
            kept, trained_state = state.state_dict(), trained.state_dict()
            trained = model(3)
            trained.load_state_dict(trained_state)
            wrapped = torch.nn.parallel.DistributedDataParallel(trained, bucket_cap_mb=0.004)
            state = DDPState(wrapped.module, "topk:k=64,values=4bit")
            state.load_state_dict(kept)
            wrapped.register_comm_hook(state, ddp_hook)
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        train(optimizer, wrapped, rank, range(3, 6))
        ends.append(weights(trained))
    return ends, state.sent


def _whole(rank: int, folder: Path) -> Any:
    """A compressor that leaves out nearly nothing gives what DDP's own mean gives."""
    ends = []
    for spec in (None, "topk:k=4096,values=16bit"):
        trained = model()
        wrapped = torch.nn.parallel.DistributedDataParallel(trained)
        if spec is not None:
            wrapped.register_comm_hook(DDPState(trained, spec), ddp_hook)
        train(torch.optim.SGD(trained.parameters(), lr=0.1), wrapped, rank, range(3))
        ends.append(np.frombuffer(weights(trained), np.float32))
    return float(np.abs(ends[0] - ends[1]).max())


def _hook_failing(rank: int, folder: Path) -> Any:
    trained = model()
    wrapped = torch.nn.parallel.DistributedDataParallel(trained)
    wrapped.register_comm_hook(DDPState(trained, "topk:k=64"), ddp_hook)
    value = loss(wrapped, rank, 0) * (float("inf") if rank == 1 else 1)
    return said(value.backward)


def _outer(rank: int, folder: Path) -> Any:
    """Outer steps with a method, and with a codec, through and from a state that was saved."""
    ends = []
    for spec in ("topk:k=8,beta=0.95", "nf4"):
        for saved in (False, True):
            trained = model()
            outer = DiLoCo(trained.named_parameters(), spec=spec, every=2)
            alone(outer, trained, rank, range(3))
            if saved:
                state = {"model": trained.state_dict(), "outer": outer.state_dict()}
                tensorwire.torch.save_file(state, folder / f"outer-{rank}")
                state, trained = tensorwire.torch.load_file(folder / f"outer-{rank}"), model(5)
                outer = DiLoCo(trained.named_parameters(), spec=spec, every=2)
                trained.load_state_dict(state["model"])
                outer.load_state_dict(state["outer"])
            alone(outer, trained, rank, range(3, 6))
            ends.append(weights(trained))
    return ends, outer.sent


def _averaged(rank: int, folder: Path) -> Any:
    """Whole differences, a rate of 1 and no momentum: the mean of the weights."""
    trained = model()
    outer = DiLoCo(trained.parameters(), spec="raw", every=1, rate=1.0, momentum=0.0)
    train(torch.optim.SGD(trained.parameters(), lr=0.1), trained, rank, range(1))
    before = weights(trained)
    outer.step()
    return before, weights(trained)


def _outer_failing(rank: int, folder: Path) -> Any:
    """A rank's weights are not finite: all say so; with error feedback nothing that the others learned is lost."""
    trained, start = model(), weights(model())
    outer = DiLoCo(trained.named_parameters(), spec="topk:k=4096,values=16bit", every=1, rate=1.0, momentum=0.0)
    train(torch.optim.SGD(trained.parameters(), lr=0.1), trained, rank, range(1))
    if rank == 1:
        trained[0].weight.data[0, 0] = float("inf")
    error, back = said(outer.step), weights(trained) == start
    trained.load_state_dict(model().state_dict())
    outer.step()
    return error, back, weights(trained), weights(trained) != start


def alone(outer: Any, trained: Any, rank: int, steps: range) -> None:
    """Inner steps without a memory of their own, and outer ones."""
    for step in steps:
        train(torch.optim.SGD(trained.parameters(), lr=0.1), trained, rank, range(step, step + 1))
        outer.step()


SCENARIOS = {
    function.__name__: function
    for function in (
        _equal, _late, _restarted, _drifted, _unlike, _astray, _failing, _late_failing, _hooked, _whole,
        _hook_failing, _outer, _averaged, _outer_failing,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    results = ranks(_scenarios, folder, 2, folder)
    assert None not in results, "a rank failed, and says why in its standard error"
    return results


def test_ranks_move_alike_and_send_little(done):
    (first, moved, sent), (second, _, other) = (each["equal"] for each in done)
    assert first == second and moved and sent == other
    assert sent < 8 * len(first) / 8


def test_with_overlap_a_step_counts_in_the_next_one(done):
    assert [each["late"] for each in done] == [(True, done[0]["late"][1], True)] * 2


def test_a_restart_goes_on_to_the_same_bits(done):
    assert len({end for each in done for end in each["restarted"]}) == 1


def test_ranks_with_different_weights_say_so(done):
    for error, unmoved in (each["drifted"] for each in done):
        assert unmoved
        assert error[0] is CorruptError
        assert "weights of rank 0 and rank 1 differ before step 0" in error[1]


def test_ranks_with_different_methods_say_so(done):
    for kind, text in (each["unlike"] for each in done):
        assert kind is SchemaError
        assert "rank 0 and rank 1 do not exchange the same" in text


def test_ranks_at_different_steps_say_so(done):
    for kind, text in (each["astray"] for each in done):
        assert kind is SchemaError
        assert "rank 0 at 0, rank 1 at 2" in text


def test_a_rank_that_cannot_go_on_tells_the_others(done):
    (error, unmoved, end), (other, other_unmoved, other_end) = (each["failing"] for each in done)
    assert unmoved and other_unmoved and end == other_end
    assert error[0] is TransportError and "rank 1 had nothing to send" in error[1]
    assert other[0] is NonFiniteError and "0.weight" in other[1]


def test_with_overlap_the_others_hear_of_it_a_step_later_and_nobody_falls_behind(done):
    (errors, moved, end), (others, other_moved, other_end) = (each["late_failing"] for each in done)
    assert errors[0] is None and errors[1][0] is TransportError and others[0][0] is NonFiniteError
    assert moved == other_moved and end == other_end != moved


def test_a_hook_of_ddp_keeps_ranks_alike_over_a_restart(done):
    assert len({end for each in done for end in each["hooked"][0]}) == 1
    assert done[0]["hooked"][1] > 0


def test_a_hook_that_leaves_out_nothing_is_the_mean(done):
    assert max(each["whole"] for each in done) < 1e-3


def test_a_hook_that_cannot_go_on_tells_the_others(done):
    assert [each["hook_failing"][0] for each in done] == [TransportError, NonFiniteError]


def test_outer_steps_keep_ranks_alike_over_a_restart(done):
    (first, sent), (second, _) = (each["outer"] for each in done)
    assert first == second
    assert len({*first[:2]}) == len({*first[2:]}) == 1 and first[0] != first[2]
    assert sent < len(first[0])


def test_an_outer_step_without_options_is_the_mean_of_the_weights(done):
    befores, afters = zip(*(each["averaged"] for each in done), strict=True)
    mean = np.mean([np.frombuffer(before, np.float32) for before in befores], axis=0)
    assert afters[0] == afters[1]
    assert np.allclose(np.frombuffer(afters[0], np.float32), mean, atol=1e-6)


def test_what_is_learned_before_an_outer_step_that_fails_goes_with_the_next(done):
    (error, back, end, moved), (other, _, other_end, _) = (each["outer_failing"] for each in done)
    assert error[0] is TransportError and other[0] is NonFiniteError and "0.weight" in other[1]
    assert back and moved and end == other_end


# ---- kills, and a thousand steps -------------------------------------------------------------------------------


def _killed(rank: int, folder: Path, steps: int, resume: bool, kill: int | None) -> Any:
    trained = model()
    optimizer = DeMo(trained.parameters(), lr=1e-2, spec="demo:k=4")
    path, first = folder / f"checkpoint-{rank}.tw", 0
    if resume:
        state = tensorwire.torch.load_file(path)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        if step == 3 and not resume:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            tensorwire.torch.save_file(state, path)
        if step == kill and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if error := said(lambda step=step: train(optimizer, trained, rank, range(step, step + 1))):
            return error
    return weights(trained)


def test_a_worker_is_killed_and_all_go_on_from_their_checkpoints(tmp_path):
    through = ranks(_killed, tmp_path / "a", 2, tmp_path, 8, False, None)
    assert through[0] == through[1]
    broken = ranks(_killed, tmp_path / "b", 2, tmp_path, 8, False, 5)
    assert broken[1] is None
    assert broken[0][0] is TransportError and "start all ranks again from their checkpoints" in broken[0][1]
    assert ranks(_killed, tmp_path / "c", 2, tmp_path, 8, True, None) == through


def _many(rank: int, steps: int, spec: str, beta2: float | None) -> Any:
    trained = torch.nn.Linear(20, 4, bias=False)
    torch.nn.init.zeros_(trained.weight)
    optimizer = DeMo(trained.parameters(), lr=1e-3, spec=spec, beta2=beta2, check_every=50)
    train(optimizer, trained, rank, range(steps))
    return weights(trained), tensorwire.kernels.isa


@pytest.mark.parametrize(
    ("steps", "spec", "beta2"), [(1000, "demo:k=6", None), (100, "demo:k=4,alpha=0.1,scale=chunk", 0.99)]
)
def test_many_steps_on_different_instruction_sets_end_in_the_same_bits(tmp_path, steps, spec, beta2):
    ends = ranks(_many, tmp_path, 4, steps, spec, beta2, isa=("portable",))
    assert len({end for end, _ in ends}) == 1
    assert ends[0][1] == "portable" or tensorwire.kernels.implementation == "numpy"


# ---- bytes on the sockets --------------------------------------------------------------------------------------

# Of struct tcp_info: how many bytes of data a connection has sent, and how many the kernel tells us at the least.
BYTES_SENT, TOLD = 200, 208


def _sent_over_tcp() -> int:
    """Bytes that this process has sent over the TCP connections that it has, as the kernel counted them."""
    sent = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # a file, or the folder that is being listed
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent += struct.unpack_from("=Q", told, BYTES_SENT)[0]
    return sent


def _counted(rank: int) -> Any:
    """Of a step: bytes that were given to the process group, and that went over its sockets; the shapes that travel."""
    trained = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 128))
    optimizer = DeMo(trained.named_parameters(), spec="demo:k=4", check_every=0)
    counts = []
    for _ in range(3):
        for parameter in trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        dist.barrier()
        given, sent = optimizer.sent, _sent_over_tcp()
        optimizer.step()
        dist.barrier()  # so that all is on its way
        counts.append((optimizer.sent - given, _sent_over_tcp() - sent))
    matrices = {name: tuple(each.shape) for name, each in trained.named_parameters() if each.dim() > 1}
    return counts[-1], matrices | {f"vectors of {torch.float32}": (1024 + 128,)}


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux counts what a connection has sent")
def test_what_crosses_the_sockets_is_the_message_and_little_more(tmp_path):
    with socket.socket() as unconnected:
        if len(unconnected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)) < TOLD:
            pytest.skip("this kernel does not say what a connection has sent")
    for (given, sent), shapes in ranks(_counted, tmp_path, 3):
        assert given == message_size("demo:k=4", shapes) + 32  # with the header of an exchange
        assert 0 <= sent - 2 * given < 2000  # gloo's own, and two barriers


# ---- what needs no others --------------------------------------------------------------------------------------


@pytest.fixture
def by_itself(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        DeMo(model().parameters())


@pytest.mark.usefixtures("by_itself")
def test_options_that_mean_nothing_are_refused():
    for options in ({"lr": -1}, {"lr": float("nan")}, {"weight_decay": -1}, {"check_every": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            DeMo(model().parameters(), **options)
    with pytest.raises(ValueError, match="beta must be"):
        DeMo(model().parameters(), beta2=1.0)
    both = [("w", torch.nn.Parameter(torch.ones(2))) for _ in range(2)]
    with pytest.raises(ValueError, match="same name"):
        DeMo([{"params": [both[0]]}, {"params": [both[1]]}])


@pytest.mark.usefixtures("by_itself")
def test_outer_options_that_mean_nothing_are_refused():
    for options in ({"every": 0}, {"rate": 0}, {"momentum": 1}):
        with pytest.raises(ValueError, match="at least 1"):
            DiLoCo(model().parameters(), **options)
    with pytest.raises(tensorwire.EncodeError, match="known: demo"):
        DiLoCo(model().parameters(), spec="nf5")
    outer = DiLoCo(model().parameters())
    with pytest.raises(SchemaError, match="another model"):
        outer.load_state_dict(DiLoCo(torch.nn.Linear(2, 2).parameters()).state_dict())


@pytest.mark.usefixtures("by_itself")
def test_the_state_of_another_optimizer_or_method_is_refused():
    optimizer = DeMo(model().parameters())
    with pytest.raises(SchemaError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model().parameters()).state_dict())
    with pytest.raises(SchemaError, match="not of demo"):
        optimizer.load_state_dict(DeMo(model().parameters(), spec="demo:k=5").state_dict())
    with pytest.raises(SchemaError, match="has a beta2"):
        optimizer.load_state_dict(DeMo(model().parameters(), beta2=0.9).state_dict())
    with pytest.raises(SchemaError, match="beta of 0.9, not of 0.99"):
        DeMo(model().parameters(), beta2=0.99).load_state_dict(DeMo(model().parameters(), beta2=0.9).state_dict())


def _moved(beta2: float | None, rows: Any, dtype: Any) -> Any:
    """Where a weight is after a few steps, whose gradients in these rows are small."""
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = DeMo([weight], lr=2.0**-6, spec="demo:k=8", beta2=beta2)
    for step in range(4):
        weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        weight.grad[rows] *= 2.0**-9
        optimizer.step()
    return weight.detach()


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_beta2_it_does_not_matter_how_large_the_gradients_of_a_row_are(dtype):
    dtype = getattr(torch, dtype)
    ends = [[_moved(beta2, rows, dtype) for rows in ([], range(40))] for beta2 in (0.9, None)]
    assert torch.equal(*ends[0])
    assert not torch.equal(*ends[1])


@pytest.mark.usefixtures("by_itself")
def test_with_beta2_a_gradient_that_is_not_finite_leaves_all_as_it_was():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = DeMo([("w", weight)], beta2=0.9)
    weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(NonFiniteError, match="element 0 is nan"):
        optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (weight != 1).all()


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_has_no_gradient_stays_and_what_is_frozen_is_not_sent(dtype):
    dtype = getattr(torch, dtype)
    used, unused, frozen = (torch.nn.Parameter(torch.ones(70, 3, dtype=dtype)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = DeMo([used, unused, frozen], lr=0.25, spec="demo:k=1")
    used.grad = torch.ones_like(used)
    with torch.device("meta"):  # nothing depends on where torch makes tensors by default
        assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(used, torch.full_like(used, 0.75))
    assert torch.equal(unused, torch.ones_like(unused)) and torch.equal(frozen, torch.ones_like(frozen))
    assert torch.equal(used.grad, torch.ones_like(used))
