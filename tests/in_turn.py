"""Calls made in this process, one after another, in place of `stn_fast.comparison.processes.Processes`.

As if they were sent to another process, functions, arguments and results are pickled.
"""

import pickle


class StoppedInTurn(BaseException):
    """Ends a command as abruptly as a signal that cannot be caught."""


class InTurn:
    """``calls`` are the arguments of all calls so far; the one after ``stop_after`` of them raises `StoppedInTurn`."""

    def __init__(self):
        self.calls, self.stop_after, self.jobs = [], None, None

    def __call__(self, jobs):
        self.jobs = jobs
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, tasks):
        for task in tasks:
            result = None
            while True:
                try:
                    function, arguments = task.send(result)
                except StopIteration:
                    break
                if self.stop_after == len(self.calls):
                    raise StoppedInTurn
                self.calls.append(arguments)
                result = sent(sent(function)(*sent(arguments)))

    def map(self, function, arguments):
        for argument in arguments:
            self.calls.append((argument,))
            yield sent(sent(function)(sent(argument)))


def sent(value):
    return pickle.loads(pickle.dumps(value))
