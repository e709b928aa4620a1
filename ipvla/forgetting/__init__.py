"""Fine-tuning that does not forget: fragile subspaces, gradient and update surgery, drift and its thermostat.

The room knows policies only as `probed.ProbedModel` and a list of language layers.
"""
