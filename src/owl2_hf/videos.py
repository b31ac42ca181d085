"""Deprecated: the names of `owl2_hf.scoring.frames` that version 0.1.0 had here."""

from .deprecation import warn_deprecated
from .scoring.frames import VIDEO_SUFFIXES, is_video_path, read_frames

__all__ = ["VIDEO_SUFFIXES", "is_video_path", "read_frames"]

warn_deprecated(
    "owl2_hf.videos", since="0.2.0", removed_in="0.4.0", instead="owl2_hf.scoring.frames"
)
