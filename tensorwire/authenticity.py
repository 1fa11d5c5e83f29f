"""The short name of `tensorwire.files.authenticity`.

from tensorwire.authenticity import check_tag, tag
"""

from tensorwire.files.authenticity import Tagged, check_manifest, check_tag, digest, manifest, tag

__all__ = ["Tagged", "check_manifest", "check_tag", "digest", "manifest", "tag"]
