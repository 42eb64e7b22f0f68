"""The nano-batch compiler: plain model -> `OperationGraph` -> `Schedule` -> `Pipeline`.

`tracer` reads the graph of a layer off the model; `cost_model` prices its nodes, from the `profiler`'s measurements or
a device's data sheet; `planner` searches a `Schedule`; `verify` checks it; `pipeline` runs it on lanes.
"""
