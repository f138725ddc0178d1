"""Published results per dataset; reports show them next to the results of a run."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_LABEL = "published, single run, test-selected"


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published result, for comparison.

    Args:
        setting: description of the published protocol.
        method: the published method or ablation.
        query: our query modality to compare with.
        rank1, mAP, mINP: fractions; None = not reported.
        rank1_std: standard deviation of rank-1 over training seeds; None = single run.
        note: origin of the numbers.
    """

    setting: str
    method: str
    query: str
    rank1: float
    mAP: float | None = None
    mINP: float | None = None
    rank1_std: float | None = None
    note: str = PUBLISHED_LABEL


def published_rows(dataset: str) -> tuple[PublishedRow, ...]:
    """Return the published results of a dataset; empty if there are none.

    Source: METHOD.md section 9 (Hu, Yang, Ye, NeurIPS 2024; an independent re-run of the released code;
    others).
    """
    fused, indoor = "infrared + text", "indoor search, single-shot"
    sysu, regdb, llcm = "all search, single-shot", "10 splits", "one gallery image per camera"
    rerun = "independent re-run of the released code, mean ± standard deviation of 4 seeds"
    other = "other methods, as reported"
    rows: dict[str, tuple[PublishedRow, ...]] = {
        "sysu_mm01": (
            _published(sysu, "TVI-LFM, infrared only", "infrared", 69.89, 66.74, 53.34),
            _published(sysu, f"baseline, {fused}", "fusion", 72.52, 69.15, 55.93),
            _published(sysu, "baseline + SFF", "fusion", 77.00, 73.73, 61.50),
            _published(sysu, "baseline + SFF + MJL", "fusion", 83.97, 80.40, 69.46),
            _published(sysu, "baseline + SFF + MJL + LLM", "fusion", 84.17, 80.72, 70.02),
            _published(sysu, "baseline + SFF + MJL + MER", "ensemble", 84.88, 81.32, 70.57),
            _published(sysu, "TVI-LFM, all parts", "ensemble", 84.90, 81.47, 70.85),
            _published(indoor, "TVI-LFM, all parts", "ensemble", 89.06, 90.78, 88.39),
            _published(sysu, "TVI-LFM re-run, without MER", "fusion", 81.42, 77.29, 64.86, rerun, 0.40),
            _published(sysu, "TVI-LFM re-run, with MER", "ensemble", 81.16, 77.23, 64.86, rerun, 0.69),
            _published(sysu, "YYDS, human text", "fusion", 85.54, 81.64, 70.51, other),
            _published(sysu, "BIT (CVPR 2026), image only", "infrared", 80.53, 79.76, None, other),
            _published(sysu, "IDKL, image only", "infrared", 81.42, 79.85, None, other),
        ),
        "regdb": (
            _published(regdb, "TVI-LFM, infrared only", "infrared", 89.51, 83.51, 69.65),
            _published(regdb, "TVI-LFM, all parts", "ensemble", 91.38, 85.92, 72.73),
        ),
        "llcm": (
            _published(llcm, "TVI-LFM, infrared only", "infrared", 53.53, 59.77, 56.40),
            _published(llcm, f"baseline, {fused}", "fusion", 52.63, 58.82, 55.43),
            _published(llcm, "baseline + SFF", "fusion", 54.73, 60.95, 57.64),
            _published(llcm, "baseline + SFF + MJL", "fusion", 56.76, 63.58, 60.35),
            _published(llcm, "baseline + SFF + MJL + LLM", "fusion", 57.13, 64.06, 60.72),
            _published(llcm, "baseline + SFF + MJL + MER", "ensemble", 57.09, 63.87, 60.62),
            _published(llcm, "TVI-LFM, all parts", "ensemble", 58.19, 65.08, 61.83),
            _published(llcm, "YYDS, human text", "fusion", 58.22, 65.09, None, other),
            _published("NIR to VIS", "BIT (CVPR 2026), image only", "infrared", 66.7, None, None, other),
        ),
    }
    return rows.get(dataset, ())


def _published(
    setting: str,
    method: str,
    query: str,
    rank1: float,
    mAP: float | None,
    mINP: float | None,
    note: str = PUBLISHED_LABEL,
    rank1_std: float | None = None,
) -> PublishedRow:
    """Build a `PublishedRow` from the percentages printed in the paper."""
    return PublishedRow(
        setting=setting,
        method=method,
        query=query,
        rank1=rank1 / 100,
        mAP=None if mAP is None else mAP / 100,
        mINP=None if mINP is None else mINP / 100,
        rank1_std=None if rank1_std is None else rank1_std / 100,
        note=note,
    )
