"""The network: two-stem backbone, GeM, BN neck, text tower and semantic filtered fusion."""

from tvilfm.models.tvilfm import TVILFM, ModelSpec, spec_from_config

__all__ = ["TVILFM", "ModelSpec", "spec_from_config"]
