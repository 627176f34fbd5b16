"""All studies, by name."""

from phi_runtime.contract import nearest
from phi_runtime.errors import UsageError
from phi_train.studies.data_optimal import DataOptimal
from phi_train.studies.emergence import Emergence
from phi_train.studies.exercises import Exercises, Textbooks
from phi_train.studies.filter import Filter
from phi_train.studies.interpretability import Interpretability
from phi_train.studies.longrope import LongRopeStudy
from phi_train.studies.preferences import Preferences
from phi_train.studies.study import Study
from phi_train.studies.transfer import Transfer
from phi_train.studies.two_phase import TwoPhase
from phi_train.studies.web_arms import WebArms
from phi_train.studies.width_depth import WidthDepth

STUDIES: dict[str, Study] = {
    s.name: s
    for s in (
        WidthDepth(),
        Emergence(),
        Interpretability(),
        Filter(),
        Textbooks(),
        Exercises(),
        WebArms(),
        Transfer(),
        TwoPhase(),
        DataOptimal(),
        Preferences(),
        LongRopeStudy(),
    )
}


def get_study(name: str) -> Study:
    """Raises UsageError with the nearest name."""
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    return STUDIES[name]
