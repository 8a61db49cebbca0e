"""The objects that ``--json`` prints, as types: docs/reference/json.md says in words what each key is.

Keys are only added in later versions. A key that is not required is there in the runs that have something to say of it.
Sizes are in bytes. Nothing here is imported by a command; ``make docs`` writes JSON Schemas of it.
"""

from __future__ import annotations

from typing import Any

from qz.json_reports.calibration import (
    BlockError,
    CalibrateReport,
    CompareReport,
    LinearScore,
    OutputError,
    Scores,
    TimestepError,
)
from qz.json_reports.conversion import (
    Combination,
    Component,
    ConvertedBytes,
    ConvertedOrigin,
    Footprint,
    Importance,
    KeptLayers,
    Lora,
    MergeReport,
    ModelReport,
    NonFinite,
    Part,
    PipelineReport,
    Point,
    Recorded,
    Report,
    ScoreFile,
    Shard,
    Tensors,
    UpToDateReport,
)
from qz.json_reports.files import ExitError, RecordedFile, WrittenRecord
from qz.json_reports.inspection import (
    Estimate,
    File,
    Finding,
    InspectedComponent,
    InspectReport,
    Quantization,
    StoredShare,
    Tensor,
    Verdict,
    Verified,
)
from qz.json_reports.publishing import PushedBytes, PushedFile, PushReport
from qz.json_reports.shared import LayerLoss, Loss, Origin, Parameters, Problem, TotalLoss
from qz.json_reports.verification import AttestReport, Counted, Devices, Difference, Located, VerifyReport

__all__ = [
    "OF_COMMANDS",
    "AttestReport",
    "BlockError",
    "CalibrateReport",
    "Combination",
    "CompareReport",
    "Component",
    "Conversion",
    "ConvertedBytes",
    "ConvertedOrigin",
    "Counted",
    "Devices",
    "Difference",
    "Estimate",
    "ExitError",
    "File",
    "Finding",
    "Footprint",
    "Importance",
    "InspectReport",
    "InspectedComponent",
    "KeptLayers",
    "LayerLoss",
    "LinearScore",
    "Located",
    "Lora",
    "Loss",
    "MergeReport",
    "ModelReport",
    "NonFinite",
    "Origin",
    "OutputError",
    "Parameters",
    "Part",
    "PipelineReport",
    "Point",
    "Problem",
    "PushReport",
    "PushedBytes",
    "PushedFile",
    "Quantization",
    "Recorded",
    "RecordedFile",
    "Report",
    "ScoreFile",
    "Scores",
    "Shard",
    "StoredShare",
    "Tensor",
    "Tensors",
    "TimestepError",
    "TotalLoss",
    "UpToDateReport",
    "Verdict",
    "Verified",
    "VerifyReport",
    "WrittenRecord",
]

Conversion = ModelReport | PipelineReport | UpToDateReport

OF_COMMANDS: dict[str, Any] = {
    "quantize": Conversion,
    "dequantize": Conversion,
    "merge": MergeReport,
    "verify": VerifyReport,
    "attest": AttestReport,
    "push": PushReport,
    "calibrate": CalibrateReport,
    "compare": CompareReport,
    "inspect": InspectReport,
}
"""What each command prints with ``--json``; where it fails, ``ExitError`` in a line of its own."""
