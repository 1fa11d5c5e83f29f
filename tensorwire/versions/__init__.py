"""A store of versions: published as patches and anchors, followed by any number of workers.

    with Publisher("versions") as publisher:                     # a folder, or s3://bucket/versions
        publisher.publish(model.state_dict())

    subscriber = Subscriber("https://host/versions")             # the folder, as a web server shows it
    subscriber.fetch().apply(model.state_dict())                 # fetched and verified, then applied in place

`manifest` says which files lead from which version to which, without I/O; `stores` are the doors to a folder, a web
server and fsspec.
"""

from tensorwire.versions.manifest import Manifest, Route, Stored, Version
from tensorwire.versions.publisher import Published, Publisher
from tensorwire.versions.stores import FolderStore, FsspecStore, HttpStore, Store, open_store
from tensorwire.versions.subscriber import Staged, Subscriber

__all__ = [
    "FolderStore",
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
    "open_store",
]
