"""Less work a picture: what a sampling step need not compute again, for any model."""

from mm.fast.guidance import AdaptiveGuidance, GuidanceGate
from mm.fast.hook import GuidanceReport, adaptive_guidance
from mm.fast.refresh import refresh_steps

__all__ = ["AdaptiveGuidance", "GuidanceGate", "GuidanceReport", "adaptive_guidance", "refresh_steps"]
