"""Celery on Kafka, written as for any other broker: nothing here names brokerkit, it only has to be installed.

Start this twice or more often, in this folder, then run `enqueue.py`:

    celery -A myapp worker --loglevel=info

Kafka is at localhost:9092, or where CELERY_BROKER_URL says.
"""

from celery import Celery

app = Celery("myapp", broker="kafka://localhost:9092", backend="rpc://")  # results come back through Kafka, too
app.conf.broker_transport_options = {"prefix": "myapp."}  # before all names, so that others can share the cluster
app.conf.broker_connection_retry_on_startup = True


@app.task
def add(x, y):
    return x + y


@app.task(bind=True, max_retries=5)
def fetch(self, page):
    if self.request.retries < 2:  # the page is not there yet
        raise self.retry(countdown=0.2)
    return f"{page} at attempt {self.request.retries + 1}"


@app.task(acks_late=True)  # a worker that dies has not done it: another one does
def remind(text):
    return text
