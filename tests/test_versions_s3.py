"""A store of versions on a server that speaks S3, and what becomes of it where requests race, fail and break off.

The server is moto's, in a process of its own.
"""

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proxy import Proxy, Reset

import tensorwire
from tensorwire import MissingFileError, SequenceError, StorageError, TransportError
from tensorwire.versions import FsspecStore, Publisher, Subscriber, follow, open_store, stores

pytest.importorskip("s3fs", reason="needs s3fs, an S3 client: pip install s3fs")
pytest.importorskip("moto.server", reason='needs moto, an S3 server: pip install "moto[s3]" flask flask-cors')

SERVER = """
import logging, sys
import boto3
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
port = server.get_host_and_port()[1]
account = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **account).create_bucket(Bucket="bucket")
print(port, flush=True)
sys.stdin.read()
"""
STATE = dict[str, Any]
ROOT = Path(__file__).parent.parent


def model(step: int = 0) -> STATE:
    rng = np.random.default_rng(5)
    state = {"w": rng.normal(size=50_000).astype(np.float32), "step": np.array(step)}
    for number in range(step):
        state["w"][number::100] *= 1.001
    return state


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        yield int(server.stdout.readline())
        server.stdin.close()


def options(port: int, **more: Any) -> dict[str, Any]:
    """What s3fs takes. No instance is shared, as between processes."""
    account = {"key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{port}"}
    return {**account, "skip_instance_cache": True, **more}


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A folder of its own in the bucket."""
    return f"s3://bucket/{request.node.name}"


@pytest.fixture
def account(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks whom, as the environment says it."""
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


@pytest.fixture
def store(url: str, port: int) -> FsspecStore:
    return FsspecStore(url, options=options(port))


def test_versions_in_a_bucket(store: FsspecStore) -> None:
    with pytest.raises(MissingFileError, match="nothing is published"):
        Subscriber(store).fetch()
    worker = model()
    subscriber = Subscriber(store, have=tensorwire.digest(worker))
    with Publisher(store, anchor_every=3, keep=1) as publisher:
        for step in range(8):
            done = publisher.publish(model(step))
            assert not done.notes
            subscriber.fetch().apply(worker)
            assert tensorwire.digest(worker) == done.digest == subscriber.have
    assert tensorwire.digest(Subscriber(store).fetch().state) == done.digest
    with Publisher(store, keep=1) as publisher:
        assert not publisher.publish(model(7)).is_new
        assert publisher.publish(model(8)).number == 9
    before = subscriber.manifest().files
    with Publisher(store, anchor_every=1, keep=1) as publisher:
        publisher.publish(model(9))
    assert {name for name in store.names() if name.endswith(".tw")} == before | subscriber.manifest().files


def test_a_file_of_many_parts_is_written_and_read_in_parts(
    url: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FsspecStore(url, options=options(port, default_block_size=5 << 20))
    state = {"w": np.random.default_rng(0).integers(0, 256, 12 << 20, np.uint8)}
    monkeypatch.setattr(stores, "_REQUEST", 1 << 20)
    with Publisher(store, codec="raw") as publisher:
        publisher.publish(state)
    assert np.array_equal(Subscriber(store).fetch().state["w"], state["w"])


def test_files_of_any_size_are_read_completely(store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_REQUEST", 100)
    for size in (0, 1, 99, 100, 101, 300):
        store.write("000000000001-0123456789abcdef.patch.tw", [bytes(size)])
        with store.open("000000000001-0123456789abcdef.patch.tw") as file:
            assert file.read() == bytes(size)


def test_stale_listings_do_not_hide_new_versions(url: str, port: int) -> None:
    here = FsspecStore(url, options=options(port))
    subscriber = Subscriber(here)
    with Publisher(here) as publisher:
        publisher.publish(model(0))
    here._fs.ls(here._root)
    with Publisher(FsspecStore(url, options=options(port))) as publisher:
        for step in range(1, 4):
            digest = publisher.publish(model(step)).digest
    assert subscriber.fetch().target.digest == digest


class Between(FsspecStore):
    """Does something between a publisher's look at the manifest and its writing of it."""

    def __init__(self, url: str, options: Any, act: Any) -> None:
        super().__init__(url, options=options)
        condition = self._condition

        def then_acts(name: str, before: bytes | None) -> dict[str, Any]:
            found = condition(name, before)
            act()
            return found

        self._condition = then_acts  # type: ignore[method-assign]


@pytest.mark.parametrize("versions", [0, 2])
def test_of_two_publishers_that_write_at_once_one_is_refused(url: str, port: int, versions: int) -> None:
    store = FsspecStore(url, options=options(port))
    for step in range(versions):
        with Publisher(store) as publisher:
            publisher.publish(model(step))
    fast = Publisher(store)
    slow = Publisher(Between(url, options(port), lambda: fast.publish(model(10))))
    with pytest.raises(SequenceError, match="another publisher is at work"):
        slow.publish(model(20))
    manifest = Subscriber(store).manifest()
    assert manifest.head.number == versions + 1 and manifest.head.digest == tensorwire.digest(model(10))
    assert fast.publish(model(11)).number == versions + 2
    with pytest.raises(SequenceError, match="another one is at work"):
        slow.publish(model(20))
    assert {name for name in store.names() if name.endswith(".tw")} == Subscriber(store).manifest().files


def test_a_lost_answer_to_a_manifest_write_still_publishes(store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = store._fs.pipe_file

    def silent(*arguments: Any, **condition: Any) -> None:
        pipe(*arguments, **condition)
        raise TimeoutError("no answer")

    with Publisher(store) as publisher:
        publisher.publish(model(0))
        with monkeypatch.context() as patched:
            patched.setattr(store._fs, "pipe_file", silent)
            assert publisher.publish(model(1)).number == 2
        assert publisher.publish(model(2)).number == 3
    assert tensorwire.digest(Subscriber(store).fetch().state) == tensorwire.digest(model(2))


def test_servers_without_conditional_writes_work(store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = store._fs.pipe_file

    def old(path: str, data: bytes, **condition: Any) -> None:
        if condition:
            raise OSError(errno.ENOSYS, "not implemented")
        pipe(path, data)

    monkeypatch.setattr(store._fs, "pipe_file", old)
    with Publisher(store) as publisher:
        assert [publisher.publish(model(step)).number for step in range(3)] == [1, 2, 3]


def test_a_failed_put_keeps_the_old_version_and_is_retried(store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with Publisher(store) as publisher:
        publisher.publish(model(0))
        for what in ("pipe_file", "open"):
            with monkeypatch.context() as patched:
                patched.setattr(store._fs, what, refused)
                with pytest.raises(TransportError, match="no more") as caught:
                    publisher.publish(model(1))
            assert caught.value.retryable
            assert tensorwire.digest(Subscriber(store).fetch().state) == tensorwire.digest(model(0))
        assert publisher.publish(model(1)).number == 2
    assert tensorwire.digest(Subscriber(store).fetch().state) == tensorwire.digest(model(1))


def refused(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.EIO, "no more")


def test_a_cut_connection_is_a_retryable_transport_error(url: str, port: int) -> None:
    with Publisher(FsspecStore(url, options=options(port))) as publisher:
        digest = publisher.publish(model(0)).digest
    quick = {"config_kwargs": {"retries": {"max_attempts": 1}}}
    with Proxy(port, down=Reset(at=100_000)) as proxy:
        store = FsspecStore(url, options=options(proxy.port, **quick))
        store._fs.retries = 1
        worker = {"w": np.zeros(50_000, np.float32), "step": np.array(0)}
        subscriber = Subscriber(store)
        with pytest.raises(TransportError) as caught:
            subscriber.fetch()
        assert caught.value.retryable and not worker["w"].any() and subscriber.have is None
    with Proxy(port, down=Reset(at=100_000), faulty=2) as proxy:
        subscriber = Subscriber(FsspecStore(url, options=options(proxy.port)))
        subscriber.fetch().apply(worker)
    assert tensorwire.digest(worker) == digest


def test_missing_permissions_are_not_retryable(store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise PermissionError("access denied")

    monkeypatch.setattr(store._fs, "cat_file", forbidden)
    with pytest.raises(TransportError, match="access denied") as caught:
        next(follow(store, "model.safetensors"))
    assert not caught.value.retryable


def test_a_missing_bucket_must_be_made_first(port: int) -> None:
    with Publisher(FsspecStore("s3://nowhere/run", options=options(port))) as publisher:
        with pytest.raises(StorageError, match="Make it first"):
            publisher.publish(model(0))


@pytest.mark.usefixtures("account")
def test_a_publisher_at_work_and_followers_by_the_same_address(url: str, tmp_path: Path) -> None:
    """By the URL alone, as the commands are called: all of them share what s3fs remembers."""
    numbers = {tensorwire.digest(model(step)): step + 1 for step in range(12)}
    trouble: list[BaseException] = []

    def keep(state: STATE) -> None:
        subscriber = Subscriber(url, have=tensorwire.digest(state))
        last = 0
        try:
            while last < 12:
                staged = subscriber.fetch()
                staged.apply(state)
                assert numbers[tensorwire.digest(state)] == staged.target.number >= last
                last = staged.target.number
        except BaseException as error:
            trouble.append(error)

    with Publisher(url, anchor_every=4, keep=2) as publisher:
        publisher.publish(model(0))
        followers = [threading.Thread(target=keep, args=(model(0),)) for _ in range(3)]
        for follower in followers:
            follower.start()
        for step in range(1, 12):
            publisher.publish(model(step))
    for follower in followers:
        follower.join()
    assert not trouble, trouble
    command = [sys.executable, "-m", "tensorwire", "follow", url, str(tmp_path / "model.safetensors"), "--timeout", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "version 12" in done.stderr, done.stderr
    assert isinstance(open_store(url), FsspecStore)


@pytest.mark.usefixtures("account")
def test_the_recipe_runs_over_s3(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    page = (ROOT / "docs" / "recipes" / "versions.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    for pattern in (r"^folder = .*$", r"^url = .*$"):
        code, count = re.subn(pattern, 'folder = url = "s3://bucket/recipe"', code, flags=re.MULTILINE)
        assert count == 1
    code = code.replace("train(20)", "train(6)")
    assert 'folder = url = "s3://bucket/' in page.partition("## Notes")[2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"versions, \d+ bytes", done.stdout)) == 3
