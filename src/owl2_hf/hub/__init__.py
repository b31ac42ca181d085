"""Push a model folder to the Hub. A file that does not belong to a model stops the push."""

from .files import check_code, checked_names
from .upload import PushReport, push

__all__ = ["PushReport", "check_code", "checked_names", "push"]
