"""DeMo and the hook of DDP between processes over gloo: weights are equal on all ranks, and all say what breaks."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

import tensorwire
from tensorwire.errors import CorruptError, NonFiniteError, SchemaError, TensorwireError, TransportError
from tensorwire.integrations.torch_distributed import DDPState, DeMo, ddp_hook

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
    for way in ("through", "torch", "tensorwire"):
        trained = model()
        optimizer = DeMo(trained.parameters(), lr=1e-2, spec="lowrank:rank=2,beta=0.9", overlap=True)
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
            optimizer = DeMo(trained.parameters(), lr=1e-2, spec="lowrank:rank=2,beta=0.9", overlap=True)
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


SCENARIOS = {
    function.__name__: function
    for function in (
        _equal, _late, _restarted, _drifted, _unlike, _astray, _failing, _hooked, _whole, _hook_failing,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return ranks(_scenarios, folder, 2, folder)


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


def test_a_hook_of_ddp_keeps_ranks_alike_over_a_restart(done):
    assert len({end for each in done for end in each["hooked"][0]}) == 1
    assert done[0]["hooked"][1] > 0


def test_a_hook_that_leaves_out_nothing_is_the_mean(done):
    assert max(each["whole"] for each in done) < 1e-3


def test_a_hook_that_cannot_go_on_tells_the_others(done):
    assert [each["hook_failing"][0] for each in done] == [TransportError, NonFiniteError]


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


def _thousand(rank: int) -> Any:
    trained = torch.nn.Linear(20, 4, bias=False)
    torch.nn.init.zeros_(trained.weight)
    optimizer = DeMo(trained.parameters(), lr=1e-3, spec="demo:k=6", check_every=50)
    train(optimizer, trained, rank, range(1000))
    return weights(trained), tensorwire.kernels.isa


def test_a_thousand_steps_on_different_instruction_sets_end_in_the_same_bits(tmp_path):
    ends = ranks(_thousand, tmp_path, 4, isa=("portable",))
    assert len({end for end, _ in ends}) == 1
    assert ends[0][1] == "portable" or tensorwire.kernels.implementation == "numpy"


# ---- what needs no others --------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        DeMo(model().parameters())


@pytest.mark.usefixtures("alone")
def test_options_that_mean_nothing_are_refused():
    for options in ({"lr": -1}, {"lr": float("nan")}, {"weight_decay": -1}, {"check_every": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            DeMo(model().parameters(), **options)
    both = [("w", torch.nn.Parameter(torch.ones(2))) for _ in range(2)]
    with pytest.raises(ValueError, match="same name"):
        DeMo([{"params": [both[0]]}, {"params": [both[1]]}])


@pytest.mark.usefixtures("alone")
def test_the_state_of_another_optimizer_or_method_is_refused():
    optimizer = DeMo(model().parameters())
    with pytest.raises(SchemaError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model().parameters()).state_dict())
    with pytest.raises(SchemaError, match="not of demo"):
        optimizer.load_state_dict(DeMo(model().parameters(), spec="demo:k=5").state_dict())


@pytest.mark.usefixtures("alone")
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
