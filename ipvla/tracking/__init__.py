"""Where metrics go: the console, a JSONL file, MLflow, W&B. A run logs to several through `Sinks`."""

from ipvla.tracking.mlflow_run import require_usable, without_password
from ipvla.tracking.mlflow_sink import MLflowSink, TrackingConfig
from ipvla.tracking.mlflow_spool import RunIdentity
from ipvla.tracking.mlflow_sync import Synced, sync, waiting
from ipvla.tracking.sinks import ConsoleSink, JsonlSink, MetricSink, Sinks, read_jsonl
from ipvla.tracking.wandb_sink import WandbConfig, WandbSink

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "MLflowSink",
    "MetricSink",
    "RunIdentity",
    "Sinks",
    "Synced",
    "TrackingConfig",
    "WandbConfig",
    "WandbSink",
    "read_jsonl",
    "require_usable",
    "sync",
    "waiting",
    "without_password",
]
