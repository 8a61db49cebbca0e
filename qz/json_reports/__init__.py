"""The objects that ``--json`` prints, as types: docs/reference/json.md says in words what each key is.

Keys are only added in later versions. A key that is not required is there in the runs that have something to say of it.
Sizes are in bytes. Nothing here is imported by a command; ``make docs`` writes JSON Schemas of it.
"""

from __future__ import annotations

from typing import Any

from qz.json_reports.calibration import (
    BlockError as BlockError,
)
from qz.json_reports.calibration import (
    CalibrateReport as CalibrateReport,
)
from qz.json_reports.calibration import (
    CompareReport as CompareReport,
)
from qz.json_reports.calibration import (
    LinearScore as LinearScore,
)
from qz.json_reports.calibration import (
    OutputError as OutputError,
)
from qz.json_reports.calibration import (
    Scores as Scores,
)
from qz.json_reports.calibration import (
    TimestepError as TimestepError,
)
from qz.json_reports.conversion import (
    Combination as Combination,
)
from qz.json_reports.conversion import (
    Component as Component,
)
from qz.json_reports.conversion import (
    ConvertedBytes as ConvertedBytes,
)
from qz.json_reports.conversion import (
    ConvertedOrigin as ConvertedOrigin,
)
from qz.json_reports.conversion import (
    Footprint as Footprint,
)
from qz.json_reports.conversion import (
    Importance as Importance,
)
from qz.json_reports.conversion import (
    KeptLayers as KeptLayers,
)
from qz.json_reports.conversion import (
    Lora as Lora,
)
from qz.json_reports.conversion import (
    MergeReport as MergeReport,
)
from qz.json_reports.conversion import (
    ModelReport as ModelReport,
)
from qz.json_reports.conversion import (
    NonFinite as NonFinite,
)
from qz.json_reports.conversion import (
    Part as Part,
)
from qz.json_reports.conversion import (
    PipelineReport as PipelineReport,
)
from qz.json_reports.conversion import (
    Point as Point,
)
from qz.json_reports.conversion import (
    Recorded as Recorded,
)
from qz.json_reports.conversion import (
    Report as Report,
)
from qz.json_reports.conversion import (
    ScoreFile as ScoreFile,
)
from qz.json_reports.conversion import (
    Shard as Shard,
)
from qz.json_reports.conversion import (
    Tensors as Tensors,
)
from qz.json_reports.conversion import (
    UpToDateReport as UpToDateReport,
)
from qz.json_reports.files import (
    ExitError as ExitError,
)
from qz.json_reports.files import (
    RecordedFile as RecordedFile,
)
from qz.json_reports.files import (
    WrittenRecord as WrittenRecord,
)
from qz.json_reports.inspection import (
    Estimate as Estimate,
)
from qz.json_reports.inspection import (
    File as File,
)
from qz.json_reports.inspection import (
    Finding as Finding,
)
from qz.json_reports.inspection import (
    InspectedComponent as InspectedComponent,
)
from qz.json_reports.inspection import (
    InspectReport as InspectReport,
)
from qz.json_reports.inspection import (
    Quantization as Quantization,
)
from qz.json_reports.inspection import (
    StoredShare as StoredShare,
)
from qz.json_reports.inspection import (
    Tensor as Tensor,
)
from qz.json_reports.inspection import (
    Verdict as Verdict,
)
from qz.json_reports.inspection import (
    Verified as Verified,
)
from qz.json_reports.publishing import (
    PushedBytes as PushedBytes,
)
from qz.json_reports.publishing import (
    PushedFile as PushedFile,
)
from qz.json_reports.publishing import (
    PushReport as PushReport,
)
from qz.json_reports.shared import (
    LayerLoss as LayerLoss,
)
from qz.json_reports.shared import (
    Loss as Loss,
)
from qz.json_reports.shared import (
    Origin as Origin,
)
from qz.json_reports.shared import (
    Parameters as Parameters,
)
from qz.json_reports.shared import (
    Problem as Problem,
)
from qz.json_reports.shared import (
    TotalLoss as TotalLoss,
)
from qz.json_reports.verification import (
    AttestReport as AttestReport,
)
from qz.json_reports.verification import (
    Counted as Counted,
)
from qz.json_reports.verification import (
    Devices as Devices,
)
from qz.json_reports.verification import (
    Difference as Difference,
)
from qz.json_reports.verification import (
    Located as Located,
)
from qz.json_reports.verification import (
    VerifyReport as VerifyReport,
)

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
