"""stub"""
class Inspection: pass
def inspect(*a, **k): raise NotImplementedError
