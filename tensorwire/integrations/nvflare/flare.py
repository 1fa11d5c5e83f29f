"""The names of FLARE that the plug-in relies on; the import names any that a version of FLARE lacks."""

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLMetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.fuel.f3.streaming.download_service import (
        Consumer,
        Downloadable,
        DownloadService,
        ProduceRC,
        download_object,
    )
    from nvflare.fuel.utils import fobs
    from nvflare.fuel.utils.fobs.datum import DatumManager
    from nvflare.fuel.utils.fobs.decomposers.via_downloader import ViaDownloaderDecomposer
    from nvflare.fuel.utils.memory_utils import cleanup_memory, try_malloc_trim
    from nvflare.widgets.widget import Widget
except ImportError as error:
    raise ImportError(
        "tensorwire.integrations.nvflare needs nvflare 2.7.2 or later (pip install tensorwire[nvflare]); "
        f"the installed version lacks a name that is needed: {error}"
    ) from error

__all__ = [
    "DXO",
    "Consumer",
    "DXOFilter",
    "DataKind",
    "DatumManager",
    "DownloadService",
    "Downloadable",
    "EventType",
    "FLContext",
    "FLMetaKey",
    "FLModel",
    "ModelAggregator",
    "ProduceRC",
    "Shareable",
    "ViaDownloaderDecomposer",
    "Widget",
    "cleanup_memory",
    "download_object",
    "fobs",
    "try_malloc_trim",
]
