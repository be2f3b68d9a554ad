"""What every test may rely on: no setting of this machine or this user reaches it."""

import os

# Before any test module is collected, because torch, wandb and matplotlib read their variables when first imported.
for variable in list(os.environ):
    if variable.startswith(('FDSL_', 'WANDB_')): del os.environ[variable]
os.environ['MPLBACKEND'] = 'Agg'     # no window opens, on no machine
