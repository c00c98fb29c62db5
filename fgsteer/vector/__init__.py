"""Steering vectors: a direction at a hookpoint, what it is made of, and where it came from.

steering_vector.py  ``SteeringVector``: its interventions, its arithmetic, its files
provenance.py       what a vector remembers of how it was made, and what a sum of vectors remembers
"""

from fgsteer.vector.provenance import FEATURE_FACTS as FEATURE_FACTS
from fgsteer.vector.steering_vector import FILE_NAME as FILE_NAME
from fgsteer.vector.steering_vector import FeatureWeight as FeatureWeight
from fgsteer.vector.steering_vector import MeasuredRun as MeasuredRun
from fgsteer.vector.steering_vector import SteeringVector as SteeringVector
