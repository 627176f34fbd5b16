"""All studies, by name."""

from phi_runtime.contract import nearest
from phi_runtime.errors import UsageError
from phi_train.studies.study import Study
from phi_train.studies.width_depth import WidthDepth

STUDIES: dict[str, Study] = {s.name: s for s in (WidthDepth(),)}


def get_study(name: str) -> Study:
    """Raises UsageError with the nearest name."""
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    return STUDIES[name]
