"""The operations: each with its definition in plain torch, its gradients, and its backends.

`operation` registers them all; `gates` has what gated ones share; `serving` chooses a backend by device and dtype;
`memory` guards what reaches a kernel. A gated operation is a folder with a module for each backend.
"""
