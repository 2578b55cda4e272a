//! Ties a [`Session`] to a [`Client`]: carries out what the session wants and tells it what came of it.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::tailnet::client::{Client, Error};
use crate::tailnet::frames::Frames;
use crate::tailnet::session::{About, AuthKey, Event, Failure, Now, Session, Transmit};
use crate::tailnet::wire::{
    MapRequest, MapResponse, PingResponse, RegisterRequest, RegisterResponse,
};

/// How long a registration may take. A server lets one wait until a person has come, and asks anew after some minutes.
const REGISTER: Duration = Duration::from_secs(600);
/// How long a request that only tells may take.
const UPDATE: Duration = Duration::from_secs(30);

/// What the rest of the router asks of the session.
#[derive(Debug)]
pub enum Command {
    /// Tells something else about the node.
    About(Box<About>),
    /// Joins, with a key if there is one; for a new node key if the second is true.
    LogIn(Option<AuthKey>, bool),
    /// Leaves.
    LogOut,
}

/// What came of a request.
enum Done {
    Registered(u64, Result<RegisterResponse, Failure>),
    Updated(Result<(), Failure>),
    Frame(u64, Box<MapResponse>),
    StreamEnded(u64, Failure),
}

/// Runs a session until `commands` is closed. `look` is called with every event, and with the session as it is then.
pub async fn run(
    mut session: Session,
    client: Client,
    mut commands: mpsc::Receiver<Command>,
    mut look: impl FnMut(Event, &mut Session),
) -> Session {
    let client = Arc::new(client);
    let (done, mut finished) = mpsc::channel(16);
    // One frame waits at most: the server's TCP window waits for the rest.
    let (frame, mut frames) = mpsc::channel(1);
    let mut stream: Option<JoinHandle<()>> = None;
    let mut registration: Option<JoinHandle<()>> = None;
    session.handle_timeout(Now::read());
    loop {
        while let Some(transmit) = session.poll_transmit() {
            match transmit {
                Transmit::Register { request, attempt } => {
                    let (client, done) = (client.clone(), done.clone());
                    let task = tokio::spawn(async move {
                        let result = within(REGISTER, register(&client, &request)).await;
                        let _ = done.send(Done::Registered(attempt, result)).await;
                    });
                    if let Some(old) = registration.replace(task) {
                        old.abort();
                    }
                }
                Transmit::Update(request) => {
                    let (client, done) = (client.clone(), done.clone());
                    tokio::spawn(async move {
                        let result = within(UPDATE, update(&client, &request)).await;
                        let _ = done.send(Done::Updated(result)).await;
                    });
                }
                Transmit::OpenStream {
                    request,
                    stream: id,
                } => {
                    let (client, frame) = (client.clone(), frame.clone());
                    let task = tokio::spawn(async move {
                        let failure = read(&client, &request, id, &frame).await;
                        let _ = frame.send(Done::StreamEnded(id, failure)).await;
                    });
                    if let Some(old) = stream.replace(task) {
                        old.abort();
                    }
                }
                Transmit::CloseStream => {
                    if let Some(old) = stream.take() {
                        old.abort();
                    }
                }
                Transmit::Answer(answer) => {
                    let client = client.clone();
                    tokio::spawn(async move {
                        if let Err(error) = client.answer(answer).await {
                            tracing::debug!(
                                "an answer to the coordination server is lost: {error}"
                            );
                        }
                    });
                }
            }
        }
        while let Some(event) = session.poll_event() {
            match &event {
                Event::DialPlan(plan) => client.set_plan(plan.clone()).await,
                // The next stream is not to meet what has ended this one.
                Event::Disconnected(Failure::Silent | Failure::Broken(_)) => {
                    client.disconnect().await;
                }
                Event::Ping(asked) => {
                    // Until something else answers: that nothing can is an answer too.
                    for kind in &asked.kinds {
                        let found = PingResponse {
                            kind: Some(kind.clone()),
                            ip: Some(asked.address.clone()),
                            err: Some("this node does not ping for others".to_owned()),
                            ..PingResponse::default()
                        };
                        if let Ok(answer) = asked.answer(&found) {
                            let client = client.clone();
                            tokio::spawn(async move { client.answer(answer).await });
                        }
                    }
                }
                _ => {}
            }
            look(event, &mut session);
        }
        let due = session.poll_timeout(Now::read());
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            command = commands.recv() => match command {
                None => break,
                Some(Command::About(about)) => session.set_about(*about, Now::read()),
                Some(Command::LogIn(key, fresh)) => session.log_in(key, fresh, Now::read()),
                Some(Command::LogOut) => session.log_out(Now::read()),
            },
            Some(done) = finished.recv() => handle(&mut session, done),
            Some(frame) = frames.recv(), if session.reads() => handle(&mut session, frame),
            () = timer => session.handle_timeout(Now::read()),
        }
    }
    for task in [stream, registration].into_iter().flatten() {
        task.abort();
    }
    session
}

fn handle(session: &mut Session, done: Done) {
    let now = Now::read();
    match done {
        Done::Registered(attempt, result) => session.handle_registered(attempt, result, now),
        Done::Updated(result) => session.handle_updated(result, now),
        Done::Frame(stream, map) => session.handle_map(stream, *map, now),
        Done::StreamEnded(stream, failure) => session.handle_stream_ended(stream, failure, now),
    }
}

async fn within<T>(
    limit: Duration,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, future).await {
        Ok(result) => result.map_err(Failure::from),
        Err(_) => Err(Error::Late(limit).into()),
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Status {
                status,
                text,
                retry_after,
            } => Self::Status {
                status,
                text,
                retry_after,
            },
            other => Self::Broken(other.to_string()),
        }
    }
}

async fn register(client: &Client, request: &RegisterRequest) -> Result<RegisterResponse, Error> {
    let nodes: Vec<&str> = [&request.old_node_key, &request.node_key]
        .into_iter()
        .filter_map(|key| key.as_deref())
        .collect();
    let body = serde_json::to_vec(request)?;
    let response = client.post("/machine/register", &nodes, body).await?;
    Ok(serde_json::from_slice(&Client::whole(response).await?)?)
}

async fn update(client: &Client, request: &MapRequest) -> Result<(), Error> {
    let nodes: Vec<&str> = request.node_key.as_deref().into_iter().collect();
    let body = serde_json::to_vec(request)?;
    let response = client.post("/machine/map", &nodes, body).await?;
    Client::whole(response).await.map(drop)
}

/// Reads a stream to its end, and tells how it has ended.
async fn read(client: &Client, request: &MapRequest, id: u64, out: &mpsc::Sender<Done>) -> Failure {
    let ended = || Failure::Broken("the server has ended the map stream".to_owned());
    let read = async {
        let nodes: Vec<&str> = request.node_key.as_deref().into_iter().collect();
        let body = serde_json::to_vec(request)?;
        let mut body = client.post("/machine/map", &nodes, body).await?.into_body();
        let mut frames = Frames::default();
        while let Some(part) = body.frame().await {
            let Ok(data) = part?.into_data() else {
                continue;
            };
            frames.push(&data);
            while let Some(map) = frames.pop()? {
                if out.send(Done::Frame(id, Box::new(map))).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    };
    match read.await {
        Ok(()) => ended(),
        Err(error) => Error::into(error),
    }
}
