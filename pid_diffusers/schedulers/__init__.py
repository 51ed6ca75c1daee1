from .scheduling_pid import PIDScheduler, PIDSchedulerOutput

__all__ = ["PIDScheduler", "PIDSchedulerOutput"]
