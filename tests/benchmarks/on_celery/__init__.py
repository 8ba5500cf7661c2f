"""What Celery costs on brokerkit, beside Kombu's own transports on the same servers."""
