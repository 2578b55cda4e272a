//! Ties a [`Session`] to a [`Client`]: carries out what the session wants and tells it what came of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::tailnet::client::{Client, Error};
use crate::tailnet::frames::Frames;
use crate::tailnet::session::{Answer, Event, Failure, Now, Session, Transmit};
use crate::tailnet::wire::{MapRequest, MapResponse, RegisterRequest, RegisterResponse};

/// How long a registration may take. A server lets one wait until a person has come, and asks anew after some minutes.
const REGISTER: Duration = Duration::from_secs(600);
/// How long a request that only tells may take.
const UPDATE: Duration = Duration::from_secs(30);

/// What came of a request.
enum Done {
    Registered(u64, Result<RegisterResponse, Failure>),
    Updated(Result<(), Failure>),
    Frame(u64, Box<MapResponse>),
    StreamEnded(u64, Failure),
}

/// A session and its connection to the server. Requests that are on their way end with it.
pub struct Driver {
    session: Session,
    client: Arc<Client>,
    done: mpsc::Sender<Done>,
    finished: mpsc::Receiver<Done>,
    frame: mpsc::Sender<Done>,
    frames: mpsc::Receiver<Done>,
    stream: Option<AbortOnDrop>,
    registration: Option<AbortOnDrop>,
}

impl Driver {
    /// Drives `session` by `client`. Needs a runtime.
    pub fn new(mut session: Session, client: Client) -> Self {
        session.handle_timeout(Now::read());
        let (done, finished) = mpsc::channel(16);
        // One frame waits at most: the server's TCP window waits for the rest.
        let (frame, frames) = mpsc::channel(1);
        Self {
            session,
            client: Arc::new(client),
            done,
            finished,
            frame,
            frames,
            stream: None,
            registration: None,
        }
    }

    /// The session as it is now.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to be told something. What that leads to is done by the next [`Driver::next`].
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The session, at the end.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// For answers to what the server has asked.
    pub fn answers(&self) -> Answers {
        Answers(self.client.clone())
    }

    /// Does what the session wants until something has happened. Cancel safe.
    pub async fn next(&mut self) -> Event {
        loop {
            while let Some(transmit) = self.session.poll_transmit() {
                self.transmit(transmit);
            }
            if let Some(event) = self.session.poll_event() {
                self.look(&event);
                return event;
            }
            let due = self.session.poll_timeout(Now::read());
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(done) = self.finished.recv() => handle(&mut self.session, done),
                Some(frame) = self.frames.recv(), if self.session.reads() => {
                    handle(&mut self.session, frame);
                }
                () = timer => self.session.handle_timeout(Now::read()),
            }
        }
    }

    /// What an event means for the connection.
    fn look(&self, event: &Event) {
        let client = self.client.clone();
        match event {
            Event::DialPlan(plan) => {
                let plan = plan.clone();
                tokio::spawn(async move { client.set_plan(plan).await });
            }
            // The next stream is not to meet what has ended this one.
            Event::Disconnected(Failure::Silent | Failure::Broken(_)) => {
                tokio::spawn(async move { client.disconnect().await });
            }
            _ => {}
        }
    }

    fn transmit(&mut self, transmit: Transmit) {
        match transmit {
            Transmit::Register { request, attempt } => {
                let (client, done) = (self.client.clone(), self.done.clone());
                self.registration = Some(AbortOnDrop::spawn(async move {
                    let result = within(REGISTER, register(&client, &request)).await;
                    let _ = done.send(Done::Registered(attempt, result)).await;
                }));
            }
            Transmit::Update(request) => {
                let (client, done) = (self.client.clone(), self.done.clone());
                tokio::spawn(async move {
                    let result = within(UPDATE, update(&client, &request)).await;
                    let _ = done.send(Done::Updated(result)).await;
                });
            }
            Transmit::OpenStream {
                request,
                stream: id,
            } => {
                let (client, frame) = (self.client.clone(), self.frame.clone());
                self.stream = Some(AbortOnDrop::spawn(async move {
                    let failure = read(&client, &request, id, &frame).await;
                    let _ = frame.send(Done::StreamEnded(id, failure)).await;
                }));
            }
            Transmit::CloseStream => self.stream = None,
            Transmit::Answer(answer) => {
                let answers = self.answers();
                tokio::spawn(async move { answers.send(answer).await });
            }
        }
    }
}

/// Takes answers to what the server has asked.
#[derive(Clone)]
pub struct Answers(Arc<Client>);

impl Answers {
    /// Sends one. That it is lost is told to nobody but the log.
    pub async fn send(&self, answer: Answer) {
        if let Err(error) = self.0.answer(answer).await {
            tracing::debug!("an answer to the coordination server is lost: {error}");
        }
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(JoinHandle<()>);

impl AbortOnDrop {
    fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
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
            loop {
                let begin = Instant::now();
                let Some(map) = frames.pop()? else {
                    break;
                };
                tracing::debug!(took = ?begin.elapsed(), "a map frame was read");
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
