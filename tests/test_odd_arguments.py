"""What a caller passes by mistake is answered by the library, in words, and not by whatever Python trips over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorwire as tw
from tensorwire.transports import AsyncListener, TcpListener, TcpTransport, server_tls
from tensorwire.versions import Publisher, Subscriber, follow

STATE = {"w": np.ones((4, 5), np.float32), "b": 3}


def encoded(**options: Any) -> bytes:
    return b"".join(tw.encode(STATE, **options))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: encoded(frame_size="1MiB"), "frame_size must be from 4096 to 67108864 bytes, not '1MiB'"),
        (lambda: encoded(frame_size=1e6), "not 1000000.0"),
        (lambda: encoded(frame_size=None), "not None"),
        (lambda: encoded(report={}), "report must be a tensorwire.Report to be filled, not dict"),
        (lambda: encoded(metadata=5), "metadata must map text to text; it is of type int"),
        (lambda: tw.name_of("/a/b"), "a path is a tuple of keys, not '/a/b'"),
        (lambda: tw.name_of("w"), "a path is a tuple of keys"),
        (lambda: tw.name_of(5), "a path is a tuple of keys, not 5"),
        (lambda: tw.path_of(5), "the name of an item is text, not 5"),
        (lambda: Publisher(""), "an empty name is no store's"),
        (lambda: Subscriber(""), "an empty name is no store's"),
        (lambda: tw.OnDisk(5), "a folder is a path, not int"),
        (lambda: tw.patch("base.tw", "patch.tw", "out.tw"), r"expected a list of files, not one: give \['patch.tw'\]"),
        (lambda: tw.authenticity.manifest("model.tw"), "expected a list of files"),
        (lambda: tw.authenticity.tag(__file__, "a" * 32), "a key is bytes, not str"),
        (lambda: tw.updates.Compressor(None), "a method is a spec string"),
        (lambda: tw.updates.views(5), "expected a mapping of names to tensors, not int"),
        (lambda: tw.updates.receive(b"", None), "expected a mapping of names to tensors, not NoneType"),
        (lambda: tw.updates.Rules(on_norm="Clip"), "on_norm must be one of reject, clip, not 'Clip'"),
        (lambda: tw.updates.Rules(max_norm=-1), "max_norm must be a number above 0, not -1"),
        (lambda: tw.updates.Rules(max_weight="1"), "max_weight must be a number above 0, not '1'"),
        (lambda: tw.updates.Terms(5, 0).metadata(), "terms are a run, a base and a client as text"),
        (lambda: tw.updates.Terms("r", 0, kind="both").metadata(), "terms are a run"),
        (lambda: tw.updates.Terms("r", 0, metrics={"a": float("nan")}).metadata(), "these terms cannot be sent"),
        (lambda: tw.updates.Terms("r", 0, metrics={"a": "1"}).metadata(), "terms are a run"),
        (lambda: follow("store", "a.safetensors", interval="1"), "interval and timeout are seconds, not '1'"),
        (lambda: TcpTransport.connect("127.0.0.1", 65536 + 80), "a port is a number from 0 to 65535, not 65616"),
        (lambda: TcpTransport.connect("127.0.0.1", "80"), "not '80'"),
        (lambda: TcpTransport.connect(None, 80), "a host is text, not NoneType"),
        (lambda: TcpTransport.connect("a" * 64, 80), "is no name of a host"),
        (lambda: TcpTransport.connect("a..b", 80), "is no name of a host"),
        (
            lambda: TcpTransport.connect("127.0.0.1", 80, tls=True),
            "tls is what client_tls or server_tls gives",
        ),
        (lambda: TcpListener("127.0.0.1", -1), "a port is a number"),
        (lambda: AsyncListener(lambda transport: None, "127.0.0.1", 99999), "a port is a number"),
        (lambda: server_tls(None, None), "a listener has a certificate and its key"),
    ],
)
def test_it_is_refused_in_words(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(tw.TensorwireError, match=says) as caught:
        call()
    assert isinstance(caught.value, (tw.ArgumentError, tw.EncodeError))


def test_a_device_that_is_not_there_is_refused() -> None:
    torch = pytest.importorskip("torch")
    missing = f"cuda:{torch.cuda.device_count() + 7}"
    with pytest.raises(tw.EncodeError, match=f"^device='{missing}'"):
        tw.torch.loads(encoded(), device=missing)


def test_the_arguments_of_a_store(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        with pytest.raises(tw.EncodeError, match="metadata must map text to text; it is of type str"):
            publisher.publish(STATE, metadata="a")
        publisher.publish(STATE)
        for number in ("1", 1.0, True):
            with pytest.raises(tw.ArgumentError, match="the number of a version is an int"):
                Subscriber(tmp_path).fetch(number=number)


def test_a_publisher_that_is_closed_publishes_nothing(tmp_path: Path) -> None:
    """It no longer has the lock: another may be at work."""
    with Publisher(tmp_path) as publisher:
        publisher.publish(STATE)
    with pytest.raises(tw.ClosedError, match="this publisher of .* is closed"):
        publisher.publish({**STATE, "b": 4})
    assert Subscriber(tmp_path).manifest().head.number == 1


def test_after_none_there_is_a_next_version(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        for number, state in enumerate((None, STATE, None, {"w": STATE["w"]}), 1):
            published = publisher.publish(state)
            assert (published.number, published.anchor is not None) == (number, True)
    fetched = Subscriber(tmp_path).fetch(whole=True).state
    assert fetched.keys() == {"w"} and np.array_equal(fetched["w"], STATE["w"])
