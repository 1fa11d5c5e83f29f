"""A store of versions: published as patches and anchors, followed by any number of workers.

    with Publisher("versions") as publisher:                     # a folder, or s3://bucket/versions
        publisher.publish(model.state_dict())

    subscriber = Subscriber("https://host/versions")             # the folder, served by a web server
    subscriber.fetch().apply(model.state_dict())                 # fetched and verified, then applied in place

`manifest` lists versions and the files that make them, without I/O; `stores` gives access to a folder, a web server
and fsspec.
"""

from tensorwire.versions.follow import INTERVAL, Followed, follow, version_in
from tensorwire.versions.manifest import Manifest, Route, Stored, Version
from tensorwire.versions.publisher import ANCHOR_EVERY, KEEP, Published, Publisher
from tensorwire.versions.stores import FolderStore, FsspecStore, HttpStore, Store, open_store
from tensorwire.versions.subscriber import Staged, Subscriber

__all__ = [
    "ANCHOR_EVERY",
    "INTERVAL",
    "KEEP",
    "FolderStore",
    "Followed",
    "FsspecStore",
    "HttpStore",
    "Manifest",
    "Published",
    "Publisher",
    "Route",
    "Staged",
    "Store",
    "Stored",
    "Subscriber",
    "Version",
    "follow",
    "open_store",
    "version_in",
]
