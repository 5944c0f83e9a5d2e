"""Fleet sizing without a fleet: figures of the parts, the limits that follow from them, and a simulation by events. Pure, without torch.

figures (given, or measured) --> limits (arithmetic) --> simulate (the pacing rule and the device model, by events) --> plan (which split)
"""
