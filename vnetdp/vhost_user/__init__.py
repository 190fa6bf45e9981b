"""The vhost-user protocol: messages, a connection without sockets, and the socket."""
