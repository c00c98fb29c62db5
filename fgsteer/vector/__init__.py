"""Steering vectors: a direction at a hookpoint, what it is made of, and where it came from.

steering_vector.py  ``SteeringVector``: its operators, its files
applied.py          the interventions that apply a direction
arithmetic.py       factors, and the features and provenance of a sum of vectors
feature_weight.py   one feature of a vector, as tables show it
provenance.py       how a vector was made, as it is read from vectors and files
measured_run.py     what a model card needs of a benchmark's run
"""

from fgsteer.vector.feature_weight import FeatureWeight as FeatureWeight
from fgsteer.vector.measured_run import MeasuredRun as MeasuredRun
from fgsteer.vector.provenance import FEATURE_FACTS as FEATURE_FACTS
from fgsteer.vector.steering_vector import FILE_NAME as FILE_NAME
from fgsteer.vector.steering_vector import SteeringVector as SteeringVector
