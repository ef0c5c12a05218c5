"""How a signal ends the process, whatever code it interrupts."""


class Terminated(SystemExit):
    """Raised where the process stands when it is told to end. A type of its own, so that whoever
    catches everything that foreign code raises can let it pass."""
