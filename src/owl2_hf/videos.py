"""Videos as lists of frames, from `owl2_hf.scoring.frames`, under their first name."""

from .scoring.frames import VIDEO_SUFFIXES, is_video_path, read_frames

__all__ = ["VIDEO_SUFFIXES", "is_video_path", "read_frames"]
